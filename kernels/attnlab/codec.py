"""A layer's streams as codes and scales, which lie in the slots of any cache like other streams.

What is appended is encoded for each token by itself, so that neither chunks nor batches change a
code, and a cache that moves, drops or gathers slots moves their scales with them. All that attends
reads what was kept: the pass's own tokens too are decoded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnlab.quantize import decode, encode, stored_widths
from planner.kv_formats import KvFormat
from planner.layers import GQA, MLA
from planner.runtimes.attnlab_formats import parts

# Shapes.  B batch · G kv heads · T new tokens · S keys · D width of a stream


class Codec:
    """Of one layer; of MLA's one stream the latent and the rotary key have scales of their own."""

    def __init__(self, form: KvFormat, attention: GQA | MLA) -> None:
        self.parts = [(tensor, heads, width) for _, heads, width, tensor in parts(form, attention)]
        self.one_stream = isinstance(attention, MLA)

    def streams(self, dtype: torch.dtype) -> Iterator[tuple[int, int, torch.dtype]]:
        """(heads, width, dtype) of what is kept; `dtype`: that of the computation."""
        for tensor, heads, width in self.parts:
            for elements, kept in stored_widths(tensor, width):
                yield heads, elements, kept or dtype

    def encode(self, *new_BGTD: Tensor) -> tuple[Tensor, ...]:
        """Codes and scales of keys, then of values, [B, G, T, ·] each."""
        if self.one_stream:
            new_BGTD = new_BGTD[0].split([width for _, _, width in self.parts], dim=-1)
        stored: list[Tensor] = []
        for new, (tensor, _, _) in zip(new_BGTD, self.parts, strict=True):
            stored += encode(new, tensor)
        return tuple(stored)

    def decode(self, kept: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The streams again, [B, G, S, D] each."""
        each = len(kept) // len(self.parts)
        read = tuple(
            decode(kept[i * each : (i + 1) * each], tensor, width=width, dtype=dtype)
            for i, (tensor, _, width) in enumerate(self.parts)
        )
        return (torch.cat(read, dim=-1),) if self.one_stream else read
