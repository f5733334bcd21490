"""Which keys a query sees: made once a forward for each kind of layer.

One rule serves causal, bidirectional, sliding, chunked and prefix attention over any cache: keys
come in any order, and their positions say who may see them; an empty slot has position −1. A mask
is T·S bytes; where none is needed there is none, and a kernel told "causal" makes its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from attnlab import alibi
from planner.layers import GQA, MLA

# Shapes.  B batch · H heads · T new tokens · S keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """What a layer's queries see: the `window` newest positions, or with `chunked` their chunk.

    `causal=False`: also what comes after them.
    """

    window: int | None = None
    chunked: bool = False
    causal: bool = True


def pattern_of(attention: GQA | MLA) -> Pattern:
    """The pattern of one layer's attention; a window that is only a mask is one too (gpt_neo)."""
    if isinstance(attention, MLA):
        return Pattern()
    windows = [w for w in (attention.sliding_window, attention.masked_window) if w is not None]
    return Pattern(window=min(windows, default=None), chunked=attention.chunked)


class Keys(NamedTuple):
    """Where the keys of a pass stand.

    `in_order`: the queries' own are the last T, and those before them are all in their past.
    """

    positions: Tensor  # int64, [S] or [B, S]
    in_order: bool


class Mask(NamedTuple):
    """What T queries see of S keys: `visible` (None: all), or plain causal; who stands where.

    `bias` is added to the scores where there is one, −inf where a query may not look.
    """

    visible: Tensor | None  # bool, [T, S] or [B, 1, T, S]
    is_causal: bool
    query_positions: Tensor  # int64, [T] or [B, T]
    key_positions: Tensor  # int64, [S] or [B, S]
    bias: Tensor | None = None  # [1 or B, H, T, S]


def make_mask(
    query_positions: Tensor,
    keys: Keys,
    pattern: Pattern,
    *,
    prefix_tokens: int = 0,
    slopes: Tensor | None = None,
) -> Mask:
    """The mask of a pass. The first `prefix_tokens` positions are seen by all (prefix-LM).

    No tensor is made for a prefill from nothing or a single token that the window holds. `slopes`
    [H] make ALiBi's bias.
    """
    T, S = query_positions.shape[-1], keys.positions.shape[-1]
    held = pattern.window is None or pattern.window >= S
    simple = keys.in_order and held and not prefix_tokens and pattern.causal and T in (1, S)
    if simple and slopes is None:
        return Mask(None, T > 1, query_positions, keys.positions)
    visible = None
    if not simple or T > 1:
        visible = visibility(query_positions, keys, pattern, prefix_tokens=prefix_tokens)
    if slopes is None:
        return Mask(visible, False, query_positions, keys.positions)
    bias = alibi.bias(slopes, query_positions, keys.positions)
    bias = bias if bias.dim() == 4 else bias[None]  # no fused kernel takes three dimensions
    if visible is not None:
        bias = torch.where(visible, bias, -torch.inf)
    return Mask(None, False, query_positions, keys.positions, bias)


def visibility(
    query_positions: Tensor, keys: Keys, pattern: Pattern = Pattern(), *, prefix_tokens: int = 0
) -> Tensor:
    """The bool table of what each query sees: [T, S], or [B, 1, T, S] if sequences differ."""
    query, key = query_positions[..., :, None], keys.positions[..., None, :]
    visible = key <= query if pattern.causal else (key >= 0) & (query >= 0)
    if prefix_tokens:
        visible = visible | (key < prefix_tokens)
    if pattern.window is not None:
        visible = visible & (key >= _first(query, pattern.window, chunked=pattern.chunked))
        if not pattern.causal:
            visible = visible & (key <= query + (pattern.window - 1))
    if not keys.in_order:
        visible = visible & (key >= 0)
    return visible if visible.dim() == 2 else visible.unsqueeze(1)


def _first(query: Tensor, window: int, *, chunked: bool) -> Tensor:
    """The oldest position that each query sees."""
    return query - query % window if chunked else query - (window - 1)
