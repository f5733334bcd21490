"""Segments from the driver, and blocks that the caching allocator had kept."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from profiles.microbench.point import OpPoint
from profiles.microbench.timing import REPLAYS, Timing, synchronize


def allocator_time(point: OpPoint, device: torch.device) -> Timing:
    """cudaMalloc of a segment, cudaFree of it, or a block that the caching allocator had kept."""
    samples = []
    for _ in range(REPLAYS):
        torch.cuda.empty_cache()
        if point.op == "cached":
            _empty(point, device)  # dropped at once: the allocator keeps its segment
        synchronize(device)
        started = time.perf_counter()
        block = _empty(point, device)
        allocated = time.perf_counter()
        del block
        released = time.perf_counter()
        torch.cuda.empty_cache()
        freed = time.perf_counter()
        samples.append(freed - released if point.op == "segment_free" else allocated - started)
    return Timing(method="host", samples_s=tuple(samples), copies=1)


def _empty(point: OpPoint, device: torch.device) -> Tensor:
    return torch.empty(point.shape["bytes"], dtype=torch.uint8, device=device)
