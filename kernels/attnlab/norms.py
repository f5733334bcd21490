"""RMSNorm and LayerNorm, rounded where transformers rounds. They start neutral."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from planner.layers import Norm


class RMSNorm(nn.Module):
    """x / rms(x), float32 inside (arXiv:1910.07467).

    Plain (llama): rounded to x's dtype, then times weight. `plus_one` (gemma-2): times 1 + weight
    in float32, then rounded.
    """

    def __init__(self, norm: Norm, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.plus_one = norm.eps, norm.plus_one
        self.weight = nn.Parameter(torch.full((width,), 0.0 if norm.plus_one else 1.0, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] → [..., h]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.plus_one:
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


def build_norm(norm: Norm, width: int, dtype: torch.dtype) -> nn.Module:
    """The norm over the last dimension."""
    if norm.kind == "rmsnorm":
        return RMSNorm(norm, width, dtype)
    return nn.LayerNorm(width, eps=norm.eps, bias=norm.bias, dtype=dtype)
