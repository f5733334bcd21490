"""norms.py and linear.py of attnlab."""

from __future__ import annotations

from planner.autograd.tensors import Tensor
from planner.layers import Norm, QKNorm
from planner.runtimes.attnlab_training.regime import AttnlabWriter
from planner.runtimes.writer import FLOAT32


class NormWriter(AttnlabWriter):
    """Norms over hidden states, and over the heads of queries and keys."""

    def norm(self, norm: Norm, x: Tensor, name: str, module: str) -> Tensor:
        """norms.RMSNorm.forward, op by op, or LayerNorm."""
        f, b, h = self.f, x.itemsize, x.sizes[-1]
        weights = [self.weight(f"{module}.weight", h)] if norm.weight else []
        if norm.kind == "layernorm":
            if norm.plus_one:
                weights = [f.shift(weight, f"{name}, 1 + weight") for weight in weights]
            if norm.bias:
                weights.append(self.weight(f"{module}.bias", h))
            wider = self.step.device == "cuda" or (self.b == FLOAT32 and bool(weights))
            kept = FLOAT32 if wider else b  # CPUs keep the input's dtype, or a wider weight's
            return f.layer_norm(x, weights, name, statistics_bytes=kept)
        wide = f.cast(x, FLOAT32, f"{name}, float32")
        wide = f.mul(wide, self._inverse_rms(wide, name), f"{name}, normalised")
        if not norm.weight:
            return f.cast(wide, b, name)
        if norm.plus_one:
            return f.cast(
                f.mul(
                    wide,
                    f.shift(f.cast(weights[0], FLOAT32), f"{name}, 1 + weight"),
                    f"{name}, scaled",
                ),
                b,
                name,
            )
        return f.mul(weights[0], f.cast(wide, b, f"{name}, normalised"), name)

    def _inverse_rms(self, wide: Tensor, name: str) -> Tensor:
        f, column = self.f, f"{name}, mean square"
        mean = f.mean(f.power(wide, f"{name}, squares"), column)
        mean = f.shift(mean, column)
        return f.rsqrt(mean, f"{name}, 1 / rms")

    def qk_norm(self, qk_norm: QKNorm, x: Tensor, name: str, module: str) -> Tensor:
        """norms.build_qk_norm(...).forward of queries or keys."""
        match qk_norm.width:
            case "head" | "full":
                return self.norm(qk_norm.norm, x, name, module)
            case "per-head":
                return self._headwise(qk_norm.norm, x, name, module)
            case "head-list":
                heads = [
                    self.norm(qk_norm.norm, head, name, f"{module}.norms.{index}")
                    for index, head in enumerate(self.f.unbind(x, -2))
                ]
                return self.f.stack(heads, -2, name)

    def _headwise(self, norm: Norm, x: Tensor, name: str, module: str) -> Tensor:
        """norms.HeadwiseNorm.forward."""
        f = self.f
        weight = self.weight(f"{module}.weight", *x.sizes[-2:])
        wide = f.cast(x, FLOAT32, f"{name}, float32")
        if norm.kind == "layernorm":
            wide = f.sub(wide, f.mean(wide, f"{name}, mean"), f"{name}, centred")
        wide = f.mul(wide, self._inverse_rms(wide, name), f"{name}, normalised")
        return f.cast(f.mul(wide, f.cast(weight, FLOAT32), f"{name}, scaled"), x.itemsize, name)

    def linear(self, x: Tensor, module: str, out: int, *, bias: bool, name: str = "") -> Tensor:
        """linear.Linear.forward, or lora.AdaptedLinear.forward."""
        weight = self.weight(f"{module}.weight", out, x.sizes[-1])
        biases = self.weight(f"{module}.bias", out) if bias else None
        if module not in self.adapted:
            return self.f.linear(x, weight, biases, name or module)
        return self.with_adapters(self.f.linear(x, weight, biases, module), x, module, name)
