"""The paged cache (PagedAttention, arXiv:2309.06180): blocks of a shared pool, wherever they lie.

A block table says which physical block holds each stretch of a sequence, so that memory is taken a
block at a time and returned in any order. Here keys and values are gathered before attention; a
paged kernel reads them where they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnlab.cache import Cache
from attnlab.masks import Keys, Pattern
from planner.errors import ConfigError, check_size
from planner.kv_formats import KvFormat
from planner.model import Model


class _Where(NamedTuple):
    """Where a pass reads and writes: N real new tokens, S positions."""

    slots: Tensor  # [B, S], physical slot of every position
    sequences: Tensor  # [N]
    places: Tensor  # [N], among the T of the pass
    targets: Tensor  # [N], physical slots
    keys: Keys


class PagedCache(Cache):
    """Every stream a pool [blocks · block_tokens, G, D]; sequences take blocks as they grow.

    `blocks`: how many the pool has; None: enough for `capacity_tokens` of each sequence. Blocks are
    taken in order, or shuffled by `generator`.
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
        block_tokens: int = 16,
        blocks: int | None = None,
        generator: torch.Generator | None = None,
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
        self.block_tokens = check_size("block_tokens", block_tokens)
        self.blocks = batch * -(-capacity_tokens // block_tokens) if blocks is None else blocks
        check_size("blocks", self.blocks)
        order = torch.arange(self.blocks)
        if generator is not None:
            order = torch.randperm(self.blocks, generator=generator)
        self.order = order.tolist()
        slots = self.blocks * block_tokens
        self.layers = [self._zeros(index, slots, -2, -1) for index in range(len(self.layers))]
        self.reset()

    def reset(self) -> None:
        """Return all blocks to the pool."""
        super().reset()
        self.free = self.order[::-1]
        self.table: list[list[int]] = [[] for _ in range(self.batch)]

    @property
    def used_blocks(self) -> int:
        """Blocks that hold tokens."""
        return self.blocks - len(self.free)

    def release(self, sequence: int) -> None:
        """Forget one sequence; its blocks go back to the pool."""
        self.free += self.table[sequence][::-1]
        self.table[sequence], self.lengths[sequence] = [], 0
        for state in (t for states in self.states for t in states):
            state[sequence].zero_()

    def _prepare(self) -> None:
        """Take the blocks that the new tokens need; where everything lies."""
        wanted = [-(-end // self.block_tokens) for end in self.ends]
        short = sum(max(0, n - len(t)) for n, t in zip(wanted, self.table, strict=True))
        if short > len(self.free):
            raise ConfigError(
                f"blocks={self.blocks} are too few: {short} more are needed, {len(self.free)} free"
            )
        for row, count in zip(self.table, wanted, strict=True):
            row += [self.free.pop() for _ in range(count - len(row))]
        padded = [row + [0] * (max(wanted) - len(row)) for row in self.table]
        starts = torch.tensor(padded, device=self.device) * self.block_tokens
        within = torch.arange(self.block_tokens, device=self.device)
        slots = (starts[:, :, None] + within).flatten(1)[:, : max(self.ends)]
        sequences, places, positions = self._real()
        keys = Keys(torch.arange(slots.shape[1], device=self.device), in_order=not self.ragged)
        self._pass: _Where | None = _Where(
            slots, sequences, places, slots[sequences, positions], keys
        )

    def keys(self, pattern: Pattern) -> Keys:
        """By position; what a shorter sequence lacks lies in all its queries' future."""
        assert self._pass is not None, "begin comes first"
        return self._pass.keys

    def _keep(self, index: int, *new_BGTD: Tensor) -> tuple[Tensor, ...]:
        """Scatter into the blocks; gather copies [B, G, S, D] of all positions."""
        assert self._pass is not None, "begin comes first"
        slots, sequences, places, targets, _ = self._pass
        out = []
        for pool, new in zip(self.layers[index], new_BGTD, strict=True):
            pool[targets] = new.detach()[sequences, :, places].to(pool.dtype)
            out.append(pool[slots].transpose(1, 2))
        return tuple(out)

    def advance(self) -> None:
        """As Cache.advance."""
        super().advance()
        self._pass = None
