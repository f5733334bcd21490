"""Random data, drawn once for each dtype, from which the inputs of every op are cut.

Drawing numbers takes longer than most ops; cutting views costs nothing. Each cut starts where the
one before it ended and wraps around at the end, so that ops which are given new cuts find data
that is not in the cache. The values are normal, never zeros, which run faster than real data does.
What is cut is read only: an op that writes in place clones first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}

ALIGNMENT_BYTES = 256
"""As cudaMalloc aligns: no kernel falls back to narrow loads."""

SHARE = {"bf16": 1.0, "fp16": 0.3, "fp32": 0.3, "fp8": 0.25}
"""Sizes of the pools of each dtype, as parts of `pool_bytes`."""

DRAWN_AT_ONCE = 2**26


class PoolError(ValueError):
    """An input larger than the pool it would be cut from."""


@dataclass(kw_only=True)
class Buffers:
    """The pools of one device."""

    device: torch.device
    pool_bytes: int
    seed: int = 0
    _pools: dict[str, Tensor] = field(default_factory=dict)
    _cursors: dict[str, int] = field(default_factory=dict)

    def take(self, dtype: str, *shape: int) -> Tensor:
        """A contiguous tensor of random values, elsewhere in the pool than the one before."""
        pool = self._pool(dtype)
        count = 1
        for extent in shape:
            count *= extent
        if count > pool.numel():
            needed = count * pool.itemsize
            raise PoolError(
                f"an input of {needed} bytes is larger than the pool of {dtype} numbers"
            )
        start = self._cursors.get(dtype, 0)
        if start + count > pool.numel():
            start = 0
        step = ALIGNMENT_BYTES // pool.itemsize
        self._cursors[dtype] = -(-(start + count) // step) * step
        return pool[start : start + count].view(shape)

    def indices(self, below: int, *shape: int) -> Tensor:
        """Whole numbers in [0, below), drawn anew."""
        return torch.randint(below, shape, device=self.device)

    def _pool(self, dtype: str) -> Tensor:
        if dtype not in self._pools:
            self._pools[dtype] = self._draw(dtype)
        return self._pools[dtype]

    def _draw(self, dtype: str) -> Tensor:
        kind = DTYPES[dtype]
        count = int(self.pool_bytes * SHARE[dtype]) // kind.itemsize
        generator = torch.Generator(device=self.device).manual_seed(self.seed)
        pool = torch.empty(count, dtype=kind, device=self.device)
        for start in range(0, count, DRAWN_AT_ONCE):
            part = pool[start : start + DRAWN_AT_ONCE]
            if dtype == "fp8":  # torch draws no fp8
                drawn = torch.empty(part.shape, dtype=torch.bfloat16, device=self.device)
                part.copy_(drawn.normal_(generator=generator))
            else:
                part.normal_(generator=generator)
        return pool


def pool_bytes(device: torch.device, free_bytes: int) -> int:
    """A pool that holds the largest points' inputs and leaves room for their outputs."""
    if device.type == "cpu":
        return min(2**29, free_bytes // 8)
    return min(14 * 2**30, free_bytes // 6)


def l2_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 32 MiB where a CPU does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(size.removesuffix("K")) * 2**10
    except (OSError, ValueError):
        return 32 * 2**20
