"""The growing cache: each pass joins its keys and values to what is held, in a new tensor.

The plainest of all, and what transformers' DynamicCache does. Old and new exist together while they
are joined, and no two passes ask the allocator for the same size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.cache import Cache, zero_padding
from attnlab.masks import Keys, Pattern
from planner.kv_formats import KvFormat
from planner.model import Model


class GrowingCache(Cache):
    """Every stream a tensor [B, G, S, D]. Padding of ragged passes stays as dead slots."""

    def __init__(
        self,
        model: Model,
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device | str,
        form: KvFormat | None = None,
        capacity_tokens: int | None = None,
    ) -> None:
        super().__init__(
            model,
            batch=batch,
            capacity_tokens=capacity_tokens,
            dtype=dtype,
            device=device,
            form=form,
        )
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        super().reset()
        self.layers = [[] for _ in self.attentions]
        self.positions: Tensor | None = None  # [B, S] once sequences differ

    def _prepare(self) -> None:
        """The position of every slot; kept from the first ragged pass on, where padding is −1."""
        if not self.ragged and self.positions is None:
            positions = torch.arange(self.length + self.T, device=self.device)
            self._keys: Keys | None = Keys(positions, in_order=True)
            return
        if self.positions is None:
            held = torch.arange(self.length, device=self.device)
            self.positions = held.expand(self.batch, self.length)
        new = self._starts()[:, None] + torch.arange(self.T, device=self.device)
        if self.real is not None:
            new = torch.where(self.real, new, -1)
        self.positions = torch.cat((self.positions, new), dim=1)
        self._keys = Keys(self.positions, in_order=False)

    def keys(self, pattern: Pattern) -> Keys:
        """In the order in which they came; padding is empty."""
        assert self._keys is not None, "begin comes first"
        return self._keys

    def _keep(self, index: int, *new_BGTD: Tensor) -> tuple[Tensor, ...]:
        """Join and keep, keys first; the first pass copies, so that nothing else is kept alive."""
        held = self.layers[index]
        for which, new in enumerate(new_BGTD):
            x = new.detach().to(self.streams[index][which].dtype)
            x = zero_padding(x, self.real)
            if len(held) <= which:
                held.append(x.clone(memory_format=torch.contiguous_format))
            else:
                held[which] = torch.cat((held[which], x), dim=2)
        return tuple(held)

    def advance(self) -> None:
        """As Cache.advance."""
        super().advance()
        self._keys = None
