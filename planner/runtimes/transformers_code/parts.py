"""Norms, linear layers, activations, feed-forwards: models/<type>/modeling_<type>.py."""

from __future__ import annotations

from planner.autograd.dora import Frozen
from planner.autograd.four_bit import FourBitLinear
from planner.autograd.tensors import Dims, Tensor
from planner.dtypes import element_bytes
from planner.layers import Dense, Norm
from planner.runtimes.transformers_code.regime import CodeWriter, FourBitWeights
from planner.runtimes.writer import FLOAT32


class PartWriter(CodeWriter):
    """What attention and the blocks are made of."""

    def norm(self, norm: Norm, x: Tensor, name: str, module: str, *shape: int) -> Tensor:
        """The norm's forward; its weights have `shape`, one number for each of the last dimension.

        A class that is written in Python holds what its forward names until it returns.
        """
        f, b, shape = self.f, x.itemsize, shape or (x.sizes[-1],)
        weights = [self.weight(f"{module}.weight", *shape)] if norm.weight else []
        if norm.kind == "layernorm":
            if self.code.norm == "python":
                return self._python_norm(x, weights[0], name)
            if norm.bias:
                weights.append(self.weight(f"{module}.bias", *shape))
            if self.code.norm == "shifted":
                weights[0] = f.shift(weights[0], f"{name}, 1 + weight")
            if self.code.norm == "float32":
                wide = f.layer_norm(
                    f.cast(x, FLOAT32, f"{name}, float32"), weights, name, statistics_bytes=FLOAT32
                )
                return f.cast(wide, b, name)
            on_gpu = self.what.device == "cuda"
            kept = FLOAT32 if on_gpu else max(b, self.b)  # CPUs: the input's dtype or the weights'
            return f.layer_norm(x, weights, name, statistics_bytes=kept)
        if self.code.norm == "mixed":
            return self._mixed_norm(x, weights[0], name)
        wide = f.cast(x, FLOAT32, f"{name}, float32")
        if norm.plus_one:  # gemma's: its _norm names nothing
            wide = f.mul(
                wide,
                f.rsqrt(f.shift(self._mean_square(wide, name), name), f"{name}, 1 / rms"),
                f"{name}, normalised",
            )
            one_more = f.shift(f.cast(weights[0], FLOAT32), f"{name}, 1 + weight")
            wide = f.mul(wide, one_more, f"{name}, scaled")
            del one_more
            return f.cast(wide, b, name)
        mean = self._mean_square(wide, name)
        wide = f.mul(
            wide,
            f.rsqrt(f.shift(mean, f"{name}, mean square"), f"{name}, 1 / rms"),
            f"{name}, normalised",
        )
        if not norm.weight:
            return f.cast(wide, b, name)
        if self.code.norm == "wide":
            return f.cast(f.mul(weights[0], wide, f"{name}, scaled"), b, name)
        return f.mul(weights[0], f.cast(wide, b, f"{name}, normalised"), name)

    def _mixed_norm(self, x: Tensor, weight: Tensor, name: str) -> Tensor:
        """T5LayerNorm.forward."""
        f = self.f
        variance = f.mean(
            f.power(f.cast(x, FLOAT32, f"{name}, float32"), f"{name}, squares"),
            f"{name}, mean square",
        )
        hidden = f.mul(
            x,
            f.rsqrt(f.shift(variance, f"{name}, mean square"), f"{name}, 1 / rms"),
            f"{name}, normalised",
        )
        hidden = f.cast(hidden, self.b, f"{name}, normalised")
        return f.mul(weight, hidden, name)

    def _mean_square(self, wide: Tensor, name: str) -> Tensor:
        return self.f.mean(self.f.power(wide, f"{name}, squares"), f"{name}, mean square")

    def _python_norm(self, x: Tensor, weight: Tensor, name: str) -> Tensor:
        """CohereLayerNorm.forward."""
        f = self.f
        wide = f.cast(x, FLOAT32, f"{name}, float32")
        mean = f.mean(wide, f"{name}, mean")
        variance = f.mean(
            f.power(f.sub(wide, mean, f"{name}, deviations"), f"{name}, squares"),
            f"{name}, variance",
        )
        wide = f.mul(
            f.sub(wide, mean, f"{name}, deviations"),
            f.rsqrt(f.shift(variance, f"{name}, variance"), f"{name}, 1 / deviation"),
            f"{name}, normalised",
        )
        wide = f.mul(f.cast(weight, FLOAT32, f"{name}, weight"), wide, f"{name}, scaled")
        return f.cast(wide, x.itemsize, name)

    def linear(self, x: Tensor, module: str, out: int, *, bias: bool, name: str = "") -> Tensor:
        """The forward of a linear layer, with its adapters where it has some."""
        four = self.what.four_bit
        if four is not None and module in four.modules - self.left_alone:
            return self._four_bit(x, module, out, four, bias=bias, name=name)
        if module not in self.adapted:
            return self._linear(x, module, out, bias=bias, name=name)
        frozen = self._frozen(module, x.sizes[-1], out, bias=bias)
        return self.with_adapters(
            self._linear(x, module, out, bias=bias, name=name), x, module, name, frozen
        )

    def _four_bit(
        self, x: Tensor, module: str, out: int, four: FourBitWeights, *, bias: bool, name: str
    ) -> Tensor:
        """The same of 4-bit weights; Conv1D is a linear layer then."""
        b, into = element_bytes(four.dtype), x.sizes[-1]
        layer = FourBitLinear(out, into, b, four.double_quant, (out, into) in four.packed)
        held = None
        if bias or self.code.conv1d:
            held = self.given(f"{module}.bias", ((out,),), b)
        if module not in self.adapted:
            return self.f.four_bit(x, layer, held, name or module)
        frozen = None
        if self.lora is not None and self.lora.dora:
            called = f"{module}, DoRA"
            frozen = Frozen(lambda: self.f.dequantised(layer, called), held, transposed=False)
        return self.with_adapters_of_four_bits(
            self.f.four_bit(x, layer, held, name or module), x, module, frozen
        )

    def _frozen(self, module: str, into: int, out: int, *, bias: bool) -> Frozen | None:
        """The layer that DoRA needs besides what it returns."""
        if self.lora is None or not self.lora.dora:
            return None
        turned = self.code.conv1d
        sizes = (into, out) if turned else (out, into)
        return Frozen(
            lambda: self.weight(f"{module}.weight", *sizes),
            self.weight(f"{module}.bias", out) if bias or turned else None,
            turned,
        )

    def _linear(self, x: Tensor, module: str, out: int, *, bias: bool, name: str = "") -> Tensor:
        """nn.Linear.forward, Conv1D.forward or FalconLinear.forward."""
        f, into = self.f, x.sizes[-1]
        if self.code.conv1d:
            weight = self.weight(f"{module}.weight", into, out)
            biases = self.weight(f"{module}.bias", out)
            rows: Dims = (tuple(e for dim in x.dims[:-1] for e in dim), x.dims[-1])
            product = f.addmm(biases, f.view(x, rows), weight, name or module)
            return f.view(product, (*x.dims[:-1], (out,)), name or module)
        weight = self.weight(f"{module}.weight", out, into)
        biases_or_none = self.weight(f"{module}.bias", out) if bias else None
        if self.code.block == "falcon":
            product = self._by_hand(x, weight, name or module)
            return product if biases_or_none is None else f.add(product, biases_or_none, module)
        return f.linear(x, weight, biases_or_none, name or module)

    def _by_hand(self, x: Tensor, weight: Tensor, name: str) -> Tensor:
        """x @ weight.T: autocast does not cache the cast of a view."""
        f = self.f
        turned = f.lowered(f.transpose(weight, 0, 1))
        rows: Dims = (tuple(e for dim in x.dims[:-1] for e in dim), x.dims[-1])
        product = f.matmul(f.view(f.lowered(x), rows), turned, name)
        return f.view(product, (*x.dims[:-1], turned.dims[1]), name)

    def feed_forward(self, dense: Dense, x: Tensor) -> Tensor:
        """LlamaMLP, Phi3MLP, GPT2MLP and their like: .forward."""
        f, i, h = self.f, dense.intermediate_size, self.model.hidden_size
        act, bias = dense.activation, dense.bias
        if dense.fused_gate_up:
            up = self.linear(x, "gate_up_proj", 2 * i, bias=bias)
            gate, up = f.split(up, (i, i))
            up = f.mul(up, self.activate(act, gate), "gate · up")
            return self.linear(up, "down_proj", h, bias=bias)
        if dense.gated:
            product = f.mul(
                self.activate(act, self.linear(x, "gate_proj", i, bias=bias)),
                self.linear(x, "up_proj", i, bias=bias),
                "gate · up",
            )
            return self.linear(product, "down_proj", h, bias=bias)
        hidden = self.linear(x, "up_proj", i, bias=bias)
        hidden = self.activate(act, hidden)
        return self.linear(hidden, "down_proj", h, bias=bias)

    def activate(self, activation: str, x: Tensor) -> Tensor:
        """activations.ACT2FN: one op of torch, or a formula in Python."""
        f, name = self.f, "activation"
        if self.code.block == "bloom":
            return f.apart(x, name, self._bloom_gelu, self._bloom_gelu_back)
        match activation:
            case "gelu_new":
                return f.mul(f.scale(x, name), f.shift(self._tanh(self._cubic(x)), name), name)
            case "gelu_fast":
                return f.mul(f.scale(x, name), f.shift(self._tanh(self._fast(x)), name), name)
            case "quick_gelu":
                return f.mul(
                    x, f.pointwise(f.scale(x, name), name, "sigmoid", saves="result"), name
                )
            case "relu2":
                return f.power(f.pointwise(x, name, "relu", saves="result"), name)
        saves = "result" if activation == "relu" else "input"
        return f.pointwise(x, name, activation.split("_")[0], saves=saves)

    def _cubic(self, x: Tensor) -> Tensor:
        """√(2/π) · (x + 0.044715 · x³)."""
        f, name = self.f, "activation"
        return f.scale(f.add(x, f.scale(f.power(x, name), name), name), name)

    def _fast(self, x: Tensor) -> Tensor:
        """x · 0.79788456 · (1 + 0.044715 · x · x)."""
        f, name = self.f, "activation"
        return f.mul(f.scale(x, name), f.shift(f.mul(f.scale(x, name), x, name), name), name)

    def _tanh(self, x: Tensor) -> Tensor:
        return self.f.pointwise(x, "activation", "tanh", saves="result")

    def _bloom_gelu(self, x: Tensor) -> Tensor:
        """modeling_bloom.bloom_gelu_forward."""
        f, name = self.f, "activation"
        return f.mul(f.scale(x, name), f.shift(self._tanh(self._fast(x)), name), name)

    def _bloom_gelu_back(self, x: Tensor, gradient: Tensor) -> Tensor:
        """modeling_bloom.bloom_gelu_back."""
        f, name = self.f, "gradient of activation"
        tanh = self._tanh(self._fast(x))
        slope = f.add(
            f.mul(
                f.scale(x, name),
                f.mul(
                    f.shift(f.mul(tanh, tanh, name), name),
                    f.shift(f.mul(f.scale(x, name), x, name), name),
                    name,
                ),
                name,
            ),
            f.scale(f.shift(tanh, name), name),
            name,
        )
        return f.mul(slope, gradient, name)
