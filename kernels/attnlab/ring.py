"""The ring cache: a sliding layer keeps the newest W positions, position p in slot p mod W.

A decode step writes over the oldest and attends to all slots, whatever their order: softmax does
not care, and no mask is needed. A longer pass attends to the ring and its own keys, side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnlab.cache import zero_padding
from attnlab.kv_cache import KVCache
from attnlab.masks import Keys, Pattern
from planner.layers import GQA, MLA


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a pass does to rings of one size: where keys stand, and which of them stay."""

    keys: Keys
    source: Tensor | None  # [B, W]: which of the joined keys goes into each slot


class RingCache(KVCache):
    """Sliding layers [B, G, min(W, capacity), D]; the others as in the static cache."""

    def slots(self, attention: GQA | MLA | None) -> int:
        """The window's positions, where there is one."""
        window = _window(attention)
        return self.capacity if window is None else min(window, self.capacity)

    def _prepare(self) -> None:
        """What happens to each size of ring; nothing special until a slot is used a second time."""
        super()._prepare()
        sizes = {self.slots(x) for x in self.attentions if _window(x) is not None}
        self.turns = {W: self._turn(W) for W in sizes if max(self.ends) > W}

    def keys(self, pattern: Pattern) -> Keys:
        """Of a ring: its slots, after the write of a single token or before that of several."""
        turn = None if pattern.window is None else self.turns.get(self._size(pattern.window))
        if turn is None:
            return super().keys(pattern)
        # a full ring is the window of the newest query, not its chunk
        return turn.keys._replace(in_order=turn.keys.in_order and not pattern.chunked)

    def _size(self, window: int) -> int:
        return min(window, self.capacity)

    def _turn(self, W: int) -> _Turn:
        rows = self.batch if self.ragged else 1  # one serves all where sequences are alike
        starts = torch.tensor(self.lengths[:rows], device=self.device)[:, None]
        ends = torch.tensor(self.ends[:rows], device=self.device)[:, None]
        slots = torch.arange(W, device=self.device)
        after = _newest(slots, ends, W)
        if self.T == 1:
            if self.ragged:
                return _Turn(Keys(after, in_order=False), None)
            return _Turn(Keys(after[0], in_order=True), None)
        places = torch.arange(self.T, device=self.device)
        if not any(self.lengths):  # nothing is held: the pass attends to itself
            return _Turn(Keys(places, in_order=not self.ragged), after.clamp(min=0))
        new = torch.where(starts + places < ends, starts + places, -1)  # [B, T]
        positions = torch.cat((_newest(slots, starts, W), new), dim=1)
        source = torch.where(after >= starts, W + after - starts, slots)
        return _Turn(
            Keys(positions if self.ragged else positions[0], in_order=False),
            source,
        )

    def _keep(self, index: int, *new_BGTD: Tensor) -> tuple[Tensor, ...]:
        """Keep the newest W positions; the streams that `keys` describes."""
        layer, attention = self.layers[index], self.attentions[index]
        turn = None if _window(attention) is None else self.turns.get(self.slots(attention))
        if turn is None:
            return super()._keep(index, *new_BGTD)
        news = [new.detach().to(kept.dtype) for kept, new in zip(layer, new_BGTD, strict=True)]
        if turn.source is None:
            return self._write_one(layer, news)
        news = [zero_padding(new, self.real) for new in news]
        joined = news
        if any(self.lengths):
            joined = [torch.cat(pair, dim=2) for pair in zip(layer, news, strict=True)]
        for kept, held in zip(layer, joined, strict=True):
            kept.copy_(held.gather(2, turn.source[:, None, :, None].expand(kept.shape)))
        return tuple(joined)

    def advance(self) -> None:
        """As Cache.advance."""
        super().advance()
        self.turns = {}

    def _write_one(self, layer: list[Tensor], news: list[Tensor]) -> tuple[Tensor, ...]:
        W = layer[0].shape[2]
        for kept, new in zip(layer, news, strict=True):
            if self._listed is None:
                kept[:, :, self.length % W].copy_(new[:, :, 0])
            else:
                b, t, p = self._listed
                kept[b, :, p % W] = new[b, :, t]
        return tuple(layer)


def _window(attention: GQA | MLA | None) -> int | None:
    return attention.sliding_window if isinstance(attention, GQA) else None


def _newest(slots: Tensor, lengths: Tensor, W: int) -> Tensor:
    """The newest position below each length [B, 1] that lies in each slot [W]; −1: none yet."""
    last = lengths - 1
    newest = last - (last - slots) % W
    return torch.where(newest >= 0, newest, -1)
