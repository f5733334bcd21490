"""Which key positions a query sees: made once a forward for each kind of layer.

A mask is T·S bytes; where none is needed there is none: a kernel told "causal" makes its own.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# Shapes.  B batch · T new tokens · S cached + new tokens


class Mask(NamedTuple):
    """What T queries see of S keys: `visible` (None: all), or plain causal; who stands where."""

    visible: Tensor | None  # bool, [T, S] or [B, 1, T, S]
    is_causal: bool
    query_positions: Tensor  # int64, [T] or [B, T]
    key_positions: Tensor  # int64, [S] or [B, S]


def make_mask(query_positions: Tensor, key_positions: Tensor, *, window: int | None) -> Mask:
    """Causal, within the window: a query sees its own and the window − 1 positions before it.

    The queries are the last T of the S positions. No tensor is made for a prefill from nothing or a
    single token that the window holds.
    """
    T, S = len(query_positions), len(key_positions)
    if (window is None or window >= S) and T in (1, S):
        return Mask(None, T > 1, query_positions, key_positions)
    visible = causal(query_positions, key_positions, window=window)
    return Mask(visible, False, query_positions, key_positions)


def causal(query_positions: Tensor, key_positions: Tensor, *, window: int | None = None) -> Tensor:
    """The bool table [T, S] of the keys that each query sees."""
    query, key = query_positions[:, None], key_positions
    if window is None:
        return key <= query
    return (key <= query) & (key > query - window)
