"""The static cache: preallocated tensors in every layer, filled from the front."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnlab.cache import Cache
from attnlab.masks import Keys, Pattern
from planner.errors import ConfigError, check_size
from planner.kv_formats import KvFormat
from planner.layers import GQA, MLA
from planner.model import Model


class KVCache(Cache):
    """Every stream a tensor [B, G, capacity, D]; position p lies in slot p.

    Sliding layers hold all positions too: a mask enforces their window. Slots start as zeros: a
    hidden one weighs nothing, and nothing times NaN would be NaN.
    """

    def __init__(
        self,
        model: Model,
        *,
        batch: int,
        capacity_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        form: KvFormat | None = None,
    ) -> None:
        check_size("capacity_tokens", capacity_tokens)
        super().__init__(
            model,
            batch=batch,
            capacity_tokens=capacity_tokens,
            dtype=dtype,
            device=device,
            form=form,
        )
        self.layers = [
            self._zeros(index, batch, -2, self.slots(attention), -1)
            for index, attention in enumerate(self.attentions)
        ]

    @property
    def capacity(self) -> int:
        """`capacity_tokens`, which this cache has."""
        assert self.capacity_tokens is not None
        return self.capacity_tokens

    def slots(self, attention: GQA | MLA | None) -> int:
        """How many slots a layer has."""
        return self.capacity

    def _prepare(self) -> None:
        """Slots from the front, and, where sequences differ, what has to be written.

        What is empty then lies in every query's future, and is overwritten before one stands there.
        """
        self._listed = self._real() if self.ragged else None
        positions = torch.arange(max(self.ends), device=self.device)
        self._keys: Keys | None = Keys(positions, in_order=not self.ragged)

    def keys(self, pattern: Pattern) -> Keys:
        """All slots up to the longest sequence's end."""
        assert self._keys is not None, "begin comes first"
        return self._keys

    def _keep(self, index: int, *new_BGTD: Tensor) -> tuple[Tensor, ...]:
        """Write behind what is held; views [B, G, S, D] of all slots that are filled."""
        layer, end = self.layers[index], max(self.ends)
        for kept, new in zip(layer, new_BGTD, strict=True):
            if self._listed is None:
                kept[:, :, self.length : end].copy_(new.detach())
            else:
                b, t, p = self._listed
                kept[b, :, p] = new.detach()[b, :, t].to(kept.dtype)
        return tuple(kept[:, :, :end] for kept in layer)

    def advance(self) -> None:
        """As Cache.advance."""
        super().advance()
        self._keys = self._listed = None


class FixedShapeCache(KVCache):
    """A static cache whose passes of one length are alike to the last shape and address.

    What differs between steps, the lengths, is a tensor on the device: a step can be captured as a
    CUDA graph or compiled once. Every pass attends to all slots, behind a mask. The caller sees to
    it that the tokens fit: nothing is read back to check.
    """

    fixed_shapes = True

    def __init__(
        self,
        model: Model,
        *,
        batch: int,
        capacity_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
        form: KvFormat | None = None,
    ) -> None:
        super().__init__(
            model,
            batch=batch,
            capacity_tokens=capacity_tokens,
            dtype=dtype,
            device=device,
            form=form,
        )
        self.starts = torch.zeros(batch, dtype=torch.int64, device=device)
        self.rows = torch.arange(batch, device=device)[:, None]

    def begin(self, T: int, *, batch: int, tokens: Sequence[int] | None = None) -> Tensor:
        """The positions [B, T] of the queries."""
        if batch != self.batch:
            raise ConfigError(f"ids have batch={batch}, the cache has batch={self.batch}")
        if tokens is not None:
            raise ConfigError("tokens are not allowed with fixed shapes: None (all are real)")
        self.T, self.new_tokens, self.real = T, [T] * batch, None
        return self.starts[:, None] + torch.arange(T, device=self.device)

    def keys(self, pattern: Pattern) -> Keys:
        """All slots; the empty ones lie in every query's future."""
        return Keys(torch.arange(self.capacity, device=self.device), in_order=False)

    def _keep(self, index: int, *new_BGTD: Tensor) -> tuple[Tensor, ...]:
        """Write behind what is held; all slots [B, G, capacity, D]."""
        places = self.starts[:, None] + torch.arange(self.T, device=self.device)
        for kept, new in zip(self.layers[index], new_BGTD, strict=True):
            kept[self.rows, :, places] = new.detach().transpose(1, 2).to(kept.dtype)
        return tuple(self.layers[index])

    def advance(self) -> None:
        """Count the pass's tokens, on the device."""
        self.starts.add_(self.T)

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        super().reset()
        self.starts.zero_()

    def take(self, other: KVCache) -> None:
        """Everything that a static cache of the same model holds, after a prefill say."""
        if other.form != self.form:
            raise ConfigError("a cache of one KV format does not fit one of another: the same form")
        if other.batch != self.batch or other.length > self.capacity:
            raise ConfigError(
                f"a cache of batch={other.batch}, length={other.length} does not fit one of "
                f"batch={self.batch}, capacity_tokens={self.capacity_tokens}"
            )
        for index, layer in enumerate(self.layers):
            for mine, theirs in zip(layer, other.layers[index], strict=True):
                mine[:, :, : other.length].copy_(theirs[:, :, : other.length])
            for mine, theirs in zip(self.states[index], other.states[index], strict=True):
                mine.copy_(theirs)
        self.cross, self.cross_real = list(other.cross), other.cross_real
        self.starts.copy_(torch.tensor(other.lengths))
