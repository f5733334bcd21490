"""Feed-forward: down(act(up(x))), or gated (arXiv:2002.05202) down(act(gate(x)) · up(x))."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from attnlab.linear import Linear
from planner.layers import Dense


def gelu_new(x: Tensor) -> Tensor:
    """GPT-2's GELU, op by op as in transformers: 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))."""
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def gelu_fast(x: Tensor) -> Tensor:
    """The same with √(2/π) as 0.7978845608: 0.5·x·(1 + tanh(0.7978845608·x·(1 + 0.044715·x²)))."""
    return 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 · x)."""
    return x * torch.sigmoid(1.702 * x)


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (arXiv:2109.08668)."""
    return relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
    "gelu_fast": gelu_fast,
    "quick_gelu": quick_gelu,
    "relu": relu,
    "relu2": relu2,
}


class FeedForward(nn.Module):
    """One dense feed-forward."""

    def __init__(self, dense: Dense, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.act = ACTIVATIONS[dense.activation]
        self.gated, self.fused = dense.gated, dense.fused_gate_up
        h, i = hidden_size, dense.intermediate_size
        linear = partial(Linear, bias=dense.bias, dtype=dtype)
        if self.fused:
            self.gate_up_proj = linear(h, 2 * i)
        else:
            if self.gated:
                self.gate_proj = linear(h, i)
            self.up_proj = linear(h, i)
        self.down_proj = linear(i, h)

    def forward(self, x_BTh: Tensor) -> Tensor:
        """[B, T, h] → [B, T, h]."""
        if self.fused:
            gate, up = self.gate_up_proj(x_BTh).chunk(2, dim=-1)
            inner = self.act(gate) * up
            del gate, up
            return self.down_proj(inner)
        if self.gated:
            return self.down_proj(self.act(self.gate_proj(x_BTh)) * self.up_proj(x_BTh))
        return self.down_proj(self.act(self.up_proj(x_BTh)))
