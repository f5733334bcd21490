"""Keys and masks of attnlab (kernels/attnlab/masks.py, ring.py): how many keys a pass sees, and
whether a layer's mask is a tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.layers import GQA, MLA
from planner.program import Dims, Extent, Number, S, Symbol, minimum


@dataclass(frozen=True, kw_only=True, slots=True)
class Pattern:
    """A kind of mask: the window, whether it is a chunk, whether a ring keeps no more than it."""

    window: int | None
    chunked: bool
    ring: bool

    @property
    def size(self) -> Symbol:
        """Slots of the ring."""
        return Symbol(self._ring, self._slots)

    @property
    def _ring(self) -> str:
        return f"min(C, {self.window})"

    @property
    def keys(self) -> Extent:
        """Keys that attention reads: the context; of a ring, its slots and a pass's own keys."""
        if not self.ring:
            return S
        turned, size = f"S > {self._ring}", self._ring
        return Symbol(
            f"({size} if {turned} and T == 1 else {size} + T if {turned} and 1 < T < S else S)",
            self._ring_keys,
        )

    def _slots(self, d: Dims) -> Number:
        assert self.window is not None
        return minimum(d.context if d.capacity is None else d.capacity, self.window)

    def _turned(self, d: Dims) -> Number:
        """1 where a slot of the ring is used a second time."""
        return (d.context > self._slots(d)) * 1 if self.ring else 0

    def _joined(self, d: Dims) -> Number:
        return self._turned(d) * (d.tokens > 1) * (d.context > d.tokens)

    def _ring_keys(self, d: Dims) -> Number:
        one, joined = self._turned(d) * (d.tokens == 1), self._joined(d)
        whole = d.context * (1 - one) * (1 - joined)
        return whole + self._slots(d) * (one + joined) + d.tokens * joined

    @property
    def turned(self) -> Symbol:
        """1 where the ring has turned: some of its slots hold a second position."""
        return Symbol(f"(S > {self._ring})", self._turned)

    @property
    def turned_one(self) -> Symbol:
        """1 where a single token turns it."""
        return Symbol(f"(S > {self._ring} and T == 1)", lambda d: self._turned(d) * (d.tokens == 1))

    @property
    def turned_several(self) -> Symbol:
        """1 where a pass of several tokens does."""
        return Symbol(f"(S > {self._ring} and T > 1)", lambda d: self._turned(d) * (d.tokens > 1))

    @property
    def alone(self) -> Symbol:
        """1 where that pass is the first: it attends to its own keys and values."""
        return Symbol(
            f"(S > {self._ring} and T == S)",
            lambda d: self._turned(d) * (d.tokens == d.context) * 1,
        )

    @property
    def joined(self) -> Symbol:
        """1 where a pass of several tokens attends to the turned ring beside its own keys."""
        return Symbol(f"(S > {self._ring} and 1 < T < S)", self._joined)

    def _tabled(self, d: Dims) -> Number:
        whole = _either((d.tokens == 1) * 1, (d.tokens == d.context) * 1)
        if self.ring and not self.chunked:
            one = self._turned(d) * (d.tokens == 1)
            return 1 - _either(one, whole * (1 - self._turned(d)))
        held = 1 if self.window is None else (d.context <= self.window) * 1
        return 1 - whole * held

    @property
    def tabled(self) -> Symbol:
        """1 where the mask is a bool tensor [T, keys]."""
        if self.ring and not self.chunked:
            return Symbol(f"(T > 1 and (T < S or S > {self._ring}))", self._tabled)
        beyond = "" if self.window is None else f" or S > {self.window}"
        return Symbol(f"(1 < T < S{beyond})", self._tabled)

    @property
    def several_or_tabled(self) -> Symbol:
        """1 where naive has any mask to apply."""
        beyond = f" or S > {self.window}"
        if self.window is None or (self.ring and not self.chunked):
            beyond = ""
        return Symbol(f"(T > 1{beyond})", lambda d: _either((d.tokens > 1) * 1, self._tabled(d)))

    @property
    def plain_causal(self) -> Symbol:
        """1 where a kernel is told "causal": naive makes the table itself."""
        held = "" if self.window is None else f" and S <= {self.window}"
        if self.ring and not self.chunked:
            held = f" and S <= {self._ring}"
        return Symbol(f"(1 < T == S{held})", lambda d: (d.tokens > 1) * (1 - self._tabled(d)))


def _either(a: Number, b: Number) -> Number:
    """1 where one of two conditions, each 0 or 1, holds."""
    return a + b - a * b


def pattern_of(attention: GQA | MLA, *, ring: bool) -> Pattern:
    """The pattern of one layer's attention."""
    if isinstance(attention, MLA):
        return Pattern(window=None, chunked=False, ring=False)
    windows = [w for w in (attention.sliding_window, attention.masked_window) if w is not None]
    return Pattern(
        window=min(windows, default=None),
        chunked=attention.chunked,
        ring=ring and attention.sliding_window is not None,
    )
