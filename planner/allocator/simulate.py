"""A trace through the allocator."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import replace

from planner.allocator.blocks import Block
from planner.allocator.device import DeviceAllocator
from planner.allocator.events import (
    Alloc,
    BeginPool,
    EmptyCache,
    EndPool,
    Event,
    Free,
    Mark,
    RecordStream,
    ReleasePool,
    Synchronize,
)
from planner.allocator.results import (
    AllocatorStats,
    MarkedUsage,
    OutOfMemory,
    OutOfMemoryError,
    Timeline,
)
from planner.allocator.settings import DEFAULTS, AllocatorSettings
from planner.errors import ConfigError, shown


def simulate(
    events: Iterable[Event],
    *,
    capacity_bytes: int | None = None,
    settings: AllocatorSettings = DEFAULTS,
    timeline: bool = False,
) -> AllocatorStats:
    """What torch's allocator reserves for a trace, from an empty device.

    The trace ends at its end or at the first request that does not fit (`stats.oom`).
    `capacity_bytes`: what the device can give, its memory less the CUDA context; None: no end.
    `timeline`: keep what was held after every event.

    Raises ConfigError for a trace that contradicts itself: an id allocated while it lives, freed or
    used when it does not, a private pool that ends without having begun.
    """
    return Replay(DeviceAllocator(settings, capacity_bytes=capacity_bytes), timeline=timeline).run(
        events
    )


class Replay:
    """A trace being played into an allocator; `live` are the blocks by the ids of the trace."""

    def __init__(self, device: DeviceAllocator, *, timeline: bool = False) -> None:
        self.device = device
        self.live: dict[Hashable, Block | None] = {}
        self.events = 0
        self.oom: OutOfMemory | None = None
        self._marked: list[MarkedUsage] = []
        self._phase: str | None = None
        self._start = device.usage()
        self._steps: list[tuple[int, int, int, int]] | None = [] if timeline else None

    def run(self, events: Iterable[Event]) -> AllocatorStats:
        """Play events up to the end or to the first that does not fit."""
        self.feed(events)
        return self.stats()

    def feed(self, events: Iterable[Event]) -> None:
        """Play more events; nothing happens any more once one did not fit."""
        if self.oom is not None:
            return
        device, live, steps = self.device, self.live, self._steps
        malloc, free = device.malloc, device.free
        index = self.events - 1
        event: Event
        try:
            for index, event in enumerate(events, self.events):
                kind = type(event)
                if kind is Alloc:
                    name, size, stream = event  # type: ignore[misc]
                    if name in live:
                        raise ConfigError(f"event {index}: {shown(name)} is allocated twice")
                    live[name] = malloc(size, stream) if size else None
                elif kind is Free:
                    name = event[0]  # type: ignore[misc]
                    if name not in live:
                        raise ConfigError(f"event {index}: {shown(name)} is not allocated")
                    block = live.pop(name)
                    if block is not None:
                        free(block)
                else:
                    self._rare(index, event)
                if steps is not None:
                    steps.append(
                        (
                            index,
                            device.allocated_bytes,
                            device.requested_bytes,
                            device.reserved_bytes,
                        )
                    )
        except OutOfMemoryError as error:
            self.oom = replace(error.oom, id=event[0], event=index)  # type: ignore[misc]
        self.events = index + 1

    def stats(self) -> AllocatorStats:
        """What was seen so far."""
        device = self.device
        marked = (*self._marked, self._open_phase())
        return AllocatorStats(
            peak_allocated_bytes=max(phase.peak_allocated_bytes for phase in marked),
            peak_requested_bytes=max(phase.peak_requested_bytes for phase in marked),
            peak_reserved_bytes=max(phase.peak_reserved_bytes for phase in marked),
            at_peak=device.at_peak,
            end=device.usage(),
            device_allocs=device.device_allocs,
            device_frees=device.device_frees,
            retries=device.retries,
            events=self.events,
            marks=tuple(phase for phase in marked if phase.name is not None),
            oom=self.oom,
            timeline=None if self._steps is None else _timeline(self._steps),
        )

    def _open_phase(self) -> MarkedUsage:
        device = self.device
        return MarkedUsage(
            name=self._phase,
            start=self._start,
            peak_allocated_bytes=device.peak_allocated_bytes,
            peak_requested_bytes=device.peak_requested_bytes,
            peak_reserved_bytes=device.peak_reserved_bytes,
        )

    def _rare(self, index: int, event: Event) -> None:
        """Everything that is neither Alloc nor Free."""
        device = self.device
        match event:
            case Mark(name):
                self._marked.append(self._open_phase())
                self._phase, self._start = name, device.usage()
                device.reset_peaks()
            case RecordStream(name, stream):
                if name not in self.live:
                    raise ConfigError(f"event {index}: {shown(name)} is not allocated")
                block = self.live[name]
                if block is not None:
                    device.record_stream(block, stream)
            case Synchronize():
                device.synchronize()
            case EmptyCache():
                device.empty_cache()
            case BeginPool(pool):
                device.begin_pool(pool)
            case EndPool():
                device.end_pool()
            case ReleasePool(pool):
                device.release_pool(pool)
            case _:
                raise ConfigError(f"event {index}: {shown(event)} is not an allocator event")


def _timeline(steps: list[tuple[int, int, int, int]]) -> Timeline:
    events, allocated, requested, reserved = zip(*steps, strict=True) if steps else ((),) * 4
    return Timeline(
        events=events,
        allocated_bytes=allocated,
        requested_bytes=requested,
        reserved_bytes=reserved,
    )
