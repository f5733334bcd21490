"""Norms, linear layers, feed-forwards: models/<type>/modeling_<type>.py."""

from __future__ import annotations

from planner.autograd.tensors import Tensor
from planner.layers import Dense, Norm
from planner.runtimes.transformers_training.regime import TransformersWriter
from planner.runtimes.writer import FLOAT32

WIDE_NORMS = frozenset(("olmo2", "olmo3"))
"""Types whose RMSNorm multiplies by the weight in float32 and rounds after it."""


class PartWriter(TransformersWriter):
    """What attention and the blocks are made of."""

    def norm(self, norm: Norm, x: Tensor, name: str, module: str) -> Tensor:
        """RMSNorm.forward, op by op, or nn.LayerNorm."""
        f, b, h = self.f, self.b, x.sizes[-1]
        weights = [self.weight(f"{module}.weight", h)] if norm.weight else []
        if norm.kind == "layernorm":
            if norm.bias:
                weights.append(self.weight(f"{module}.bias", h))
            kept = FLOAT32 if self.step.device == "cuda" else b  # CPUs keep the input's dtype
            return f.layer_norm(x, weights, name, statistics_bytes=kept)
        wide = f.cast(x, FLOAT32, f"{name}, float32")
        mean = f.mean(f.power(wide, f"{name}, squares"), f"{name}, mean square")
        inverse = f.rsqrt(f.shift(mean, f"{name}, mean square"), f"{name}, 1 / rms")
        wide = f.mul(wide, inverse, f"{name}, normalised")
        del inverse
        if norm.plus_one:  # gemma's
            one = f.shift(f.cast(weights[0], FLOAT32), f"{name}, 1 + weight")
            return f.cast(f.mul(wide, one, f"{name}, scaled"), b, name)
        if self.model.text_type in WIDE_NORMS:
            return f.cast(f.mul(weights[0], wide, f"{name}, scaled"), b, name)
        return f.mul(weights[0], f.cast(wide, b, f"{name}, normalised"), name)

    def linear(self, x: Tensor, module: str, out: int, *, bias: bool, name: str = "") -> Tensor:
        """nn.Linear.forward."""
        weight = self.weight(f"{module}.weight", out, x.sizes[-1])
        biases = self.weight(f"{module}.bias", out) if bias else None
        return self.f.linear(x, weight, biases, name or module)

    def feed_forward(self, dense: Dense, x: Tensor) -> Tensor:
        """LlamaMLP, Phi3MLP, Starcoder2MLP: .forward."""
        f, i, h = self.f, dense.intermediate_size, self.model.hidden_size
        act, bias = dense.activation, dense.bias
        if dense.fused_gate_up:
            both = self.linear(x, "gate_up_proj", 2 * i, bias=bias)
            gate, up = f.split(both, (i, i))
            product = f.mul(up, self._activate(act, gate), "gate · up")
            del both, gate, up
        elif dense.gated:
            product = f.mul(
                self._activate(act, self.linear(x, "gate_proj", i, bias=bias)),
                self.linear(x, "up_proj", i, bias=bias),
                "gate · up",
            )
        else:
            product = self._activate(act, self.linear(x, "up_proj", i, bias=bias))
        return self.linear(product, "down_proj", h, bias=bias)

    def _activate(self, activation: str, x: Tensor) -> Tensor:
        """activations.ACT2FN of those that torch has as one op."""
        saves = "result" if activation == "relu" else "input"
        kernel = activation.split("_")[0]
        return self.f.pointwise(x, "activation", kernel, saves=saves)
