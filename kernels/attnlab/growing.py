"""The growing cache: each pass joins its keys and values to what is held, in a new tensor.

The plainest of all, and what transformers' DynamicCache does. Old and new exist together while they
are joined, and no two passes ask the allocator for the same size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnlab.cache import Cache, zero_padding
from attnlab.masks import Keys, Pattern
from planner.model import Model


class GrowingCache(Cache):
    """Every layer two tensors [B, G, S, D]. Padding of ragged passes stays as dead slots."""

    def __init__(
        self,
        model: Model,
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device | str,
        capacity_tokens: int | None = None,
    ) -> None:
        super().__init__(
            model, batch=batch, capacity_tokens=capacity_tokens, dtype=dtype, device=device
        )
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and give the memory back."""
        super().reset()
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * len(self.attentions)
        self.positions: Tensor | None = None  # [B, S] once sequences differ

    @property
    def nbytes(self) -> int:
        """Σ over layers of 2 · B · G · S · D · itemsize."""
        return sum(t.nbytes for held in self.layers if held is not None for t in held)

    def begin(self, T: int, *, batch: int, tokens: Sequence[int] | None = None) -> Tensor:
        """As Cache.begin; from the first ragged pass on, the position of every slot is kept."""
        held, even = self.length, not self.ragged
        positions = super().begin(T, batch=batch, tokens=tokens)
        if not self.ragged and self.positions is None:
            return positions
        if self.positions is None:
            assert even
            self.positions = torch.arange(held, device=self.device).expand(batch, held)
        new = self._starts()[:, None] + torch.arange(T, device=self.device)
        real = torch.tensor(self.new_tokens, device=self.device)[:, None]
        padded = torch.where(torch.arange(T, device=self.device) < real, new, -1)
        self.positions = torch.cat((self.positions, padded), dim=1)
        return new

    def keys(self, pattern: Pattern) -> Keys:
        """In the order in which they came; padding is empty."""
        if self.positions is not None:
            return Keys(self.positions, in_order=False)
        return Keys(torch.arange(self.length + self.T, device=self.device), in_order=True)

    def append(self, index: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Join and keep; the first pass copies, so that nothing else is kept alive."""
        k, v = (x.detach().to(self.dtype) for x in (k_BGTD, v_BGTD))
        if self.ragged:
            k, v = zero_padding(k, self.new_tokens), zero_padding(v, self.new_tokens)
        held = self.layers[index]
        if held is None:
            joined = tuple(x.clone(memory_format=torch.contiguous_format) for x in (k, v))
        else:
            joined = tuple(torch.cat(pair, dim=2) for pair in zip(held, (k, v), strict=True))
        self.layers[index] = (joined[0], joined[1])
        return joined[0], joined[1]
