"""Keys and masks of attnlab (kernels/attnlab/masks.py, ring.py): how many keys a pass sees, and
whether a layer's mask is a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.layers import GQA
from planner.program import Dims, Extent, Number, S, Symbol, minimum


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """A kind of mask: the window, whether it is a chunk, whether a ring keeps no more than it."""

    window: int | None
    chunked: bool
    ring: bool

    @property
    def keys(self) -> Extent:
        """Keys that attention reads: the context; of a ring, its slots and a pass's own keys."""
        if not self.ring:
            return S
        return Symbol(f"keys_{self.window}", self._ring_keys)

    def _size(self, d: Dims) -> Number:
        assert self.window is not None
        capacity = d.context if d.capacity is None else d.capacity
        return minimum(capacity, self.window)

    def turned(self, d: Dims) -> Number:
        """1 where a slot of the ring is used a second time."""
        return (d.context > self._size(d)) * 1 if self.ring else 0

    def joined(self, d: Dims) -> Number:
        """1 where a pass of several tokens attends to the turned ring beside its own keys."""
        return self.turned(d) * (d.tokens > 1) * (d.context > d.tokens)

    def _ring_keys(self, d: Dims) -> Number:
        one = self.turned(d) * (d.tokens == 1)
        return (
            d.context * (1 - one) * (1 - self.joined(d))
            + self._size(d) * (one + self.joined(d))
            + d.tokens * self.joined(d)
        )

    def _tabled(self, d: Dims) -> Number:
        whole = ((d.tokens == 1) * 1 + (d.tokens == d.context) * 1 > 0) * 1
        if self.ring and not self.chunked:
            one = self.turned(d) * (d.tokens == 1)
            return 1 - maximum_of(one, whole * (1 - self.turned(d)))
        held = 1 if self.window is None else (d.context <= self.window) * 1
        return 1 - whole * held

    @property
    def tabled(self) -> Symbol:
        """1 where the mask is a bool tensor [T, keys]."""
        return Symbol(f"masked_{self}", self._tabled)

    @property
    def several_or_tabled(self) -> Symbol:
        """1 where naive has any mask to apply."""
        return Symbol(f"shown_{self}", lambda d: maximum_of((d.tokens > 1) * 1, self._tabled(d)))

    @property
    def plain_causal(self) -> Symbol:
        """1 where a kernel is told "causal": naive makes the table itself."""
        return Symbol(f"causal_{self}", lambda d: (d.tokens > 1) * (1 - self._tabled(d)))

    @property
    def unordered(self) -> Symbol:
        """1 where empty slots are hidden by another op."""
        return Symbol(f"unordered_{self}", lambda d: self.joined(d) * self._tabled(d))

    def __str__(self) -> str:
        return f"{self.window}{'_chunk' * self.chunked}{'_ring' * self.ring}"


def maximum_of(a: Number, b: Number) -> Number:
    """The larger of two conditions that are 0 or 1."""
    return a + b - a * b


def pattern_of(gqa: GQA, *, ring: bool) -> Pattern:
    """The pattern of one layer's attention."""
    windows = [w for w in (gqa.sliding_window, gqa.masked_window) if w is not None]
    return Pattern(
        window=min(windows, default=None),
        chunked=gqa.chunked,
        ring=ring and gqa.sliding_window is not None,
    )
