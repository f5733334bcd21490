"""RMSNorm and LayerNorm, rounded where transformers rounds. They start neutral."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from planner.layers import Norm, QKNorm


class RMSNorm(nn.Module):
    """x / rms(x), float32 inside (arXiv:1910.07467).

    Plain (llama): rounded to x's dtype, then times weight. `plus_one` (gemma-2): times 1 + weight
    in float32, then rounded.
    """

    def __init__(self, norm: Norm, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.plus_one = norm.eps, norm.plus_one
        neutral = 0.0 if norm.plus_one else 1.0
        self.weight = None
        if norm.weight:
            self.weight = nn.Parameter(torch.full((width,), neutral, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] → [..., h]."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.weight is None:
            return wide.to(x.dtype)
        if self.plus_one:
            return (wide * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * wide.to(x.dtype)


class PlusOneLayerNorm(nn.LayerNorm):
    """LayerNorm scaled by 1 + weight (nemotron)."""

    def reset_parameters(self) -> None:
        """Neutral: weight and bias 0."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] → [..., h]."""
        return layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class HeadwiseNorm(nn.Module):
    """LayerNorm or RMSNorm of each head [..., H, D] with a scale [H, D] of its own (cohere)."""

    def __init__(self, norm: Norm, heads: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.ones(heads, width, dtype=dtype))

    def forward(self, x_BTHD: Tensor) -> Tensor:
        """[B, T, H, D] → [B, T, H, D]."""
        wide = x_BTHD.float()
        if self.norm.kind == "layernorm":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.norm.eps)
        return (wide * self.weight.float()).to(x_BTHD.dtype)


class NormOfEachHead(nn.Module):
    """A norm module for each head of [..., H, D] (stablelm)."""

    def __init__(self, norm: Norm, heads: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.norms = nn.ModuleList(build_norm(norm, width, dtype) for _ in range(heads))

    def forward(self, x_BTHD: Tensor) -> Tensor:
        """[B, T, H, D] → [B, T, H, D]."""
        heads = zip(self.norms, x_BTHD.unbind(-2), strict=True)
        return torch.stack([norm(x) for norm, x in heads], dim=-2)


def build_norm(norm: Norm, width: int, dtype: torch.dtype) -> nn.Module:
    """The norm over the last dimension."""
    if norm.kind == "rmsnorm":
        return RMSNorm(norm, width, dtype)
    kind = PlusOneLayerNorm if norm.plus_one else nn.LayerNorm
    return kind(width, eps=norm.eps, elementwise_affine=norm.weight, bias=norm.bias, dtype=dtype)


def build_qk_norm(qk_norm: QKNorm, heads: int, head_dim: int, dtype: torch.dtype) -> nn.Module:
    """The norm of queries or keys: over [..., H · D] if its width is "full", else [..., H, D]."""
    match qk_norm.width:
        case "head":
            return build_norm(qk_norm.norm, head_dim, dtype)
        case "full":
            return build_norm(qk_norm.norm, heads * head_dim, dtype)
        case "per-head":
            return HeadwiseNorm(qk_norm.norm, heads, head_dim, dtype)
        case "head-list":
            return NormOfEachHead(qk_norm.norm, heads, head_dim, dtype)
