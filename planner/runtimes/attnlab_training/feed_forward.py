"""feed_forward.py of attnlab."""

from __future__ import annotations

from functools import partial

from planner.autograd.tensors import Tensor
from planner.layers import Dense
from planner.runtimes.attnlab_training.norms import NormWriter


class FeedForwardWriter(NormWriter):
    """Dense feed-forwards and their activations."""

    def feed_forward(self, dense: Dense, x: Tensor) -> Tensor:
        """FeedForward.forward."""
        f, i, h = self.f, dense.intermediate_size, self.model.hidden_size
        act, bias = dense.activation, dense.bias
        if dense.fused_gate_up:
            gate, up = f.split(self.linear(x, "gate_up_proj", 2 * i, bias=bias), (i, i))
            product = f.mul(self._activate(act, gate), up, "gate · up")
            del gate, up
        elif dense.gated:
            active = self._activate(act, self.linear(x, "gate_proj", i, bias=bias))
            product = f.mul(active, self.linear(x, "up_proj", i, bias=bias), "gate · up")
            del active
        else:
            product = self._activate(act, self.linear(x, "up_proj", i, bias=bias))
        return self.linear(product, "down_proj", h, bias=bias)

    def _activate(self, activation: str, x: Tensor) -> Tensor:
        """feed_forward.ACTIVATIONS; those that torch does not fuse op by op."""
        f, name = self.f, "activation"
        match activation:
            case "relu2":
                return f.power(f.pointwise(x, name, "relu", saves="result"), name)
            case "quick_gelu":
                sigmoid = f.pointwise(f.scale(x, name), name, "sigmoid", saves="result")
                return f.mul(x, sigmoid, name)
            case "gelu_new":
                return self._gelu_new(x)
            case "gelu_fast":
                return self._gelu_fast(x)
            case "relu":
                return f.pointwise(x, name, "relu", saves="result")
        return f.pointwise(x, name, activation.split("_")[0], saves="input")

    def _gelu_new(self, x: Tensor) -> Tensor:
        """0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))."""
        f, name = self.f, "activation"
        cubic = f.add(x, f.scale(f.power(x, "gelu_new"), "gelu_new"), "gelu_new")
        inner = f.scale(cubic, "gelu_new")
        del cubic
        half = f.scale(x, "gelu_new, half")
        tanh = partial(f.pointwise, name="gelu_new, tanh", kernel="tanh", saves="result")
        return f.mul(half, f.shift(tanh(inner), "gelu_new, 1 + tanh"), name)

    def _gelu_fast(self, x: Tensor) -> Tensor:
        """0.5·x·(1 + tanh(0.79…·x·(1 + 0.044715·x·x))), no part of it named."""
        f, name = self.f, "gelu_fast"
        tanh = partial(f.pointwise, name="gelu_fast, tanh", kernel="tanh", saves="result")
        return f.mul(
            f.scale(x, "gelu_fast, half"),
            f.shift(
                tanh(
                    f.mul(f.scale(x, name), f.shift(f.mul(f.scale(x, name), x, name), name), name)
                ),
                "gelu_fast, 1 + tanh",
            ),
            "activation",
        )
