"""Grouped-query attention (arXiv:2305.13245) of one block: projections around the attention.

Queries come in H heads, keys and values in G ≤ H; each of theirs serves H / G of them. MHA is
G = H, MQA is G = 1. What attention itself computes is in implementations.py.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from attnlab.cache import Cache
from attnlab.implementations import implementation
from attnlab.linear import Linear
from attnlab.masks import Mask
from attnlab.norms import build_qk_norm
from attnlab.positions import rotate
from planner.layers import GQA

# Shapes.  B batch · T new tokens · S keys · H query heads · G kv heads · D head dim · h hidden size


class Attention(nn.Module):
    """Projections, norms, rotation, cache, attention, output projection of one block."""

    def __init__(
        self, gqa: GQA, hidden_size: int, dtype: torch.dtype, *, attention: str, interleaved: bool
    ) -> None:
        super().__init__()
        self.gqa = gqa
        self.attend = partial(implementation(attention), scaling=gqa.scaling)
        if gqa.logit_softcap is not None:
            self.attend = partial(self.attend, logit_softcap=gqa.logit_softcap)
        self.rotate = partial(rotate, interleaved=interleaved)
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        self.widths = [H * D * (1 + gqa.output_gate), G * D, G * D]
        linear = partial(Linear, hidden_size, dtype=dtype)
        if gqa.fused_qkv:
            self.qkv_proj = linear(sum(self.widths), bias=gqa.qkv_bias)
        else:
            biases = [gqa.qkv_bias and letter not in gqa.unbiased for letter in "qkv"]
            self.q_proj, self.k_proj, self.v_proj = (
                linear(width, bias=bias) for width, bias in zip(self.widths, biases, strict=True)
            )
        self.o_proj = Linear(H * D, hidden_size, bias=gqa.o_bias, dtype=dtype)
        if gqa.qk_norm is not None:
            self.q_norm = build_qk_norm(gqa.qk_norm, H, D, dtype)
            self.k_norm = build_qk_norm(gqa.qk_norm, G, D, dtype)
        if gqa.sinks:
            self.sinks = nn.Parameter(torch.zeros(H, dtype=dtype))

    def forward(
        self,
        x_BTh: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Mask,
        cache: Cache | None,
        index: int,
    ) -> Tensor:
        """[B, T, h] → [B, T, h]; appends to layer `index` of the cache and attends to all of it."""
        q, k, v, gate = self._project(x_BTh)
        if rotation is not None:
            q = self.rotate(q, *rotation)
            k = self.rotate(k, *rotation)
        if self.gqa.qk_norm is not None and self.gqa.qk_norm.after_rope:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.gqa.temperature is not None:
            q = _grown(q, mask.query_positions, *self.gqa.temperature)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(index, k, v)
            k, v = k.to(q.dtype), v.to(q.dtype)
        sinks = {"sinks": self.sinks} if self.gqa.sinks else {}
        out = self.attend(q, k, v, mask=mask, **sinks)
        del q, k, v
        out = out.transpose(1, 2).flatten(2)  # [B, T, H·D]
        if gate is not None:
            out = out * torch.sigmoid(gate)
        return self.o_proj(out)

    def _project(self, x_BTh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries [B, T, H, D], keys and values [B, T, G, D], normed and clipped; a gate."""
        gqa = self.gqa
        if gqa.fused_qkv:
            q, k, v = self._split(self.qkv_proj(x_BTh))
        else:
            q, k, v = self.q_proj(x_BTh), self.k_proj(x_BTh), self.v_proj(x_BTh)
        gate = None
        if gqa.output_gate:  # head by head: its query, its gate
            q, gate = (x.flatten(-2) for x in q.unflatten(-1, (-1, 2 * gqa.head_dim)).chunk(2, -1))
        norm = None if gqa.qk_norm is None or gqa.qk_norm.after_rope else gqa.qk_norm
        if norm is not None and norm.width == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        if gqa.clip_qkv is not None:  # olmoe clips what it has normed
            c = gqa.clip_qkv
            q, k, v = q.clamp(-c, c), k.clamp(-c, c), v.clamp(-c, c)
        heads = (-1, gqa.head_dim)
        q, k, v = q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)
        if norm is not None and norm.width != "full":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v, gate

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one matrix: all of q, then k, then v; or, interleaved, kv head by kv head."""
        gqa = self.gqa
        if not gqa.interleaved_qkv:
            q, k, v = qkv.split(self.widths, dim=-1)
            return q, k, v
        G, D = gqa.num_key_value_heads, gqa.head_dim
        shared = gqa.num_attention_heads // G
        q, k, v = qkv.unflatten(-1, (G, shared + 2, D)).split([shared, 1, 1], dim=-2)
        return q.flatten(-3), k.flatten(-3), v.flatten(-3)


def _grown(q_BTHD: Tensor, positions: Tensor, scale: float, floor: float) -> Tensor:
    """Queries · (1 + scale · ln(1 + ⌊(p + 1) / floor⌋)), p their positions [T] or [B, T]."""
    growth = 1 + scale * torch.log1p(torch.floor((positions.float() + 1) / floor))
    return (q_BTHD * growth[..., None, None]).to(q_BTHD.dtype)
