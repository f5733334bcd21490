"""Relative position biases (T5, arXiv:1910.10683): a learned number a head for each distance.

Distances share buckets: the first half of them are exact, the others grow by a factor up to
`max_distance`, behind which all are one. A decoder looks back alone; an encoder, which looks both
ways, gives half of the buckets to each. The biases are added to scores that nothing scales.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from attnlab.linear import Embedding
from attnlab.masks import Keys, Mask, visibility
from planner.layers import Layer, RelativeBias

# Shapes.  H heads · T queries · S keys


def buckets(distance: Tensor, *, count: int, max_distance: int, causal: bool) -> Tensor:
    """The bucket of each distance key − query, int64, as in transformers 5.23's modeling_t5.py."""
    if causal:
        first, far = 0, (-distance).clamp(min=0)
    else:
        count //= 2
        first, far = (distance > 0) * count, distance.abs()
    exact = count // 2
    grown = torch.log(far.float() / exact) / math.log(max_distance / exact) * (count - exact)
    # where `far` is 0 the logarithm is −inf, and not chosen
    wide = (exact + grown.clamp(min=0).long()).clamp(max=count - 1)
    return first + torch.where(far < exact, far, wide)


class RelativeAttentionBias(Embedding):
    """The table [buckets, H] of the first block; the masks of those behind it carry its biases."""

    def __init__(
        self, count: int, heads: int, dtype: torch.dtype, *, max_distance: int, causal: bool
    ) -> None:
        super().__init__(count, heads, dtype=dtype)
        self.max_distance, self.causal = max_distance, causal

    def forward(self, mask: Mask) -> Mask:
        """The mask with biases [1 or B, H, T, S], −inf where a query may not look."""
        query, key = mask.query_positions, mask.key_positions
        found = buckets(
            key[..., None, :] - query[..., :, None],
            count=self.num_embeddings,
            max_distance=self.max_distance,
            causal=self.causal,
        )
        bias = super().forward(found).movedim(-1, -3).contiguous()
        bias = bias if bias.dim() == 4 else bias[None]
        visible = mask.visible
        if mask.is_causal:
            visible = visibility(query, Keys(key, in_order=True))
        if visible is not None:
            bias = torch.where(visible, bias, -torch.inf)
        return Mask(None, False, query, key, bias)


def add_tables(
    blocks: Iterable[nn.Module],
    layers: Iterable[Layer],
    positions: RelativeBias,
    dtype: torch.dtype,
    *,
    causal: bool,
) -> None:
    """Give a table to each block whose description has one (umt5: all of them)."""
    for block, layer in zip(blocks, layers, strict=True):
        for p in layer.extra_parameters:
            count, heads = p.shape
            block.self_attn.relative_attention_bias = RelativeAttentionBias(
                count, heads, dtype, max_distance=positions.max_distance, causal=causal
            )
