"""The KV cache: one preallocated tensor a layer, filled from the front."""

from __future__ import annotations

import torch
from torch import Tensor

from attnlab.supported import grouped_query
from planner.errors import ConfigError, check_size
from planner.model import Model


class KVCache:
    """Keys and values of up to `capacity_tokens` tokens, every layer [2, B, G, capacity, D].

    Sliding layers hold all positions too: a mask enforces their window. The dtype is the cache's
    own; attention converts what it reads. `length` is the number of tokens held.
    """

    def __init__(
        self,
        model: Model,
        *,
        batch: int,
        capacity_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.batch = check_size("batch", batch)
        self.capacity_tokens = check_size("capacity_tokens", capacity_tokens)
        self.length = 0
        self.layers: list[Tensor] = []
        for layer in model.layers:
            gqa = grouped_query(layer.attention)
            shape = (2, batch, gqa.num_key_value_heads, capacity_tokens, gqa.head_dim)
            self.layers.append(torch.empty(shape, dtype=dtype, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors: Σ over layers of 2 · B · G · capacity · D · itemsize."""
        return sum(t.nbytes for t in self.layers)

    def check_room(self, tokens: int, *, batch: int) -> None:
        """ConfigError unless `tokens` more tokens of `batch` sequences fit."""
        if batch != self.batch:
            raise ConfigError(f"ids have batch={batch}, the cache has batch={self.batch}")
        if self.length + tokens > self.capacity_tokens:
            raise ConfigError(
                f"{self.length} cached + {tokens} new tokens = {self.length + tokens} do not fit "
                f"capacity_tokens={self.capacity_tokens}"
            )

    def append(self, index: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Write T tokens behind `length` in layer `index`; views [B, G, length + T, D] of K and V.

        `length` moves by `advance`, after the last layer. No gradient flows through a cache.
        """
        end = self.length + k_BGTD.shape[2]
        keys, values = self.layers[index]
        keys[:, :, self.length : end].copy_(k_BGTD.detach())
        values[:, :, self.length : end].copy_(v_BGTD.detach())
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        """Count `tokens` that every layer has appended."""
        self.length += tokens

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.length = 0
