"""What a simulation says: peaks, what is held at the end, and how it ended."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.format import gib

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """One moment.

    `allocated_bytes`: blocks of live storages (`torch.cuda.memory_allocated`); `requested_bytes`
    what was asked for, without rounding; `reserved_bytes` all segments. `small_segments` and
    `large_segments` count cudaMallocs that are held: none with expandable segments, as in torch.
    """

    allocated_bytes: int
    requested_bytes: int
    reserved_bytes: int
    small_segments: int
    large_segments: int

    @property
    def fragmentation(self) -> float:
        """The part of the reserved bytes that no live storage has: 1 − allocated / reserved."""
        return 1.0 - self.allocated_bytes / self.reserved_bytes if self.reserved_bytes else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class OutOfMemory:
    """The request that could not be served, and what was there.

    `id` and `event` (an index) name it. `tried_bytes` is what torch's message calls
    "Tried to allocate", the segment (with expandable segments more may have been asked for: whole
    pages); `free_bytes` what the device had left, and `largest_cached_bytes` the largest free block
    of the same pool and stream.
    """

    id: Hashable
    event: int
    requested_bytes: int
    tried_bytes: int
    capacity_bytes: int
    free_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    largest_cached_bytes: int

    @property
    def message(self) -> str:
        """In torch's words."""
        return (
            f"CUDA out of memory. Tried to allocate {gib(self.tried_bytes)}. The allocator has a "
            f"total capacity of {gib(self.capacity_bytes)} of which {gib(self.free_bytes)} is "
            f"free. Of the allocated memory {gib(self.allocated_bytes)} is allocated by PyTorch, "
            f"and {gib(self.reserved_bytes - self.allocated_bytes)} is reserved by PyTorch but "
            "unallocated."
        )


class OutOfMemoryError(Exception):
    """Raised by DeviceAllocator.malloc; `simulate` turns it into AllocatorStats.oom."""

    def __init__(self, oom: OutOfMemory) -> None:
        super().__init__(oom.message)
        self.oom = oom


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkedUsage:
    """A phase between two marks: usage where it begins, the peaks within it.

    `name` is None before the first mark.
    """

    name: str | None
    start: Usage
    peak_allocated_bytes: int
    peak_requested_bytes: int
    peak_reserved_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """What was held after each event that changed it: three rows of numbers, by event index."""

    events: tuple[int, ...]
    allocated_bytes: tuple[int, ...]
    requested_bytes: tuple[int, ...]
    reserved_bytes: tuple[int, ...]

    def table(self) -> pd.DataFrame:
        """DataFrame: event, allocated_bytes, requested_bytes, reserved_bytes."""
        import pandas as pd

        return pd.DataFrame(
            {
                "event": self.events,
                "allocated_bytes": self.allocated_bytes,
                "requested_bytes": self.requested_bytes,
                "reserved_bytes": self.reserved_bytes,
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorStats:
    """The outcome of a trace; each peak is the largest value of its own, as in memory_stats().

    `at_peak` is the moment at which reserved_bytes first reached its peak. `device_allocs` counts
    cudaMallocs that succeeded (page mappings with expandable segments), `device_frees` what went
    back, `retries` is num_alloc_retries. `oom`: the request at which the trace ended, or None.
    """

    peak_allocated_bytes: int
    peak_requested_bytes: int
    peak_reserved_bytes: int
    at_peak: Usage
    end: Usage
    device_allocs: int
    device_frees: int
    retries: int
    events: int
    marks: tuple[MarkedUsage, ...]
    oom: OutOfMemory | None
    timeline: Timeline | None

    @property
    def fragmentation(self) -> float:
        """At the peak of reserved bytes: the part of them that no live storage has."""
        return self.at_peak.fragmentation
