"""Memory histories of real runs → events for the simulator, and what was really reserved.

    torch.cuda.memory._record_memory_history()       # before the first tensor
    ...                                              # the run
    json.dump(torch.cuda.memory._snapshot(), file)   # one real run becomes a fixture for ever

Format: the docstring of torch.cuda.memory._snapshot (2.13). Pickled snapshots are not opened.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.allocator import (
    Alloc,
    AllocatorSettings,
    BeginPool,
    DeviceAllocator,
    EmptyCache,
    EndPool,
    Event,
    Free,
)
from planner.allocator.settings import DEFAULTS
from planner.allocator.simulate import Replay
from planner.errors import ConfigError, shown

TAKEN = ("segment_alloc", "segment_map")
GIVEN_BACK = ("segment_free", "segment_unmap")
WITHOUT_EFFECT = ("free_requested", "oom", "snapshot", "user_defined")
"""A block is free when its free is completed; what ran out of memory got nothing."""

SHARED = (0, 0)
"""The id of the pool that is not private."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """Events of a run; for each what was reserved after it, and the address an Alloc got.

    `segments` are (address, bytes) of what cudaMalloc gave, in order.
    """

    events: tuple[Event, ...]
    reserved_bytes: tuple[int, ...]
    addresses: tuple[int | None, ...]
    segments: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayComparison:
    """A real history beside the simulator: where reserved bytes first differ, if they do.

    `first_difference` is (event, observed, simulated). `same_addresses` of `allocations` got the
    very block that they had.
    """

    events: int
    allocations: int
    same_addresses: int
    observed_peak_reserved_bytes: int
    simulated_peak_reserved_bytes: int
    first_difference: tuple[int, int, int] | None


def read_recording(path: str | Path, *, device: int = 0) -> Recording:
    """The history of one device in a snapshot that was written as JSON; ConfigError else."""
    try:
        content = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"snapshot={shown(str(path))} cannot be read as JSON: {error}") from None
    return recording(content, device=device)


def recording(snapshot: Mapping[str, Any], *, device: int = 0) -> Recording:
    """The events of a snapshot's device_traces.

    A run of segments given back becomes one EmptyCache: whether the program asked for it or the
    allocator had to, it returned all it could. Raises ConfigError for another format, and for a
    history that began after the first tensor (or whose beginning was overwritten).
    """
    state = _Reader()
    for index, entry in enumerate(_entries(snapshot, device)):
        state.read(index, entry)
    return Recording(
        events=tuple(state.events),
        reserved_bytes=tuple(state.after),
        addresses=tuple(state.addresses),
        segments=tuple(state.segments),
    )


def compare(recorded: Recording, settings: AllocatorSettings = DEFAULTS) -> ReplayComparison:
    """Play a recording; segments are put where they really lay, since ties go by address."""
    places = iter(recorded.segments)
    device = DeviceAllocator(settings)

    def place(size: int) -> int:
        address, given = next(places, (None, None))
        return address if address is not None and given == size else device.addresses(size)

    device = DeviceAllocator(settings, place=place)
    replay = Replay(device)
    difference, same = None, 0
    for index, event in enumerate(recorded.events):
        replay.feed([event])
        observed = recorded.reserved_bytes[index]
        pools = isinstance(event, BeginPool | EndPool)  # noted late, at the first allocation
        if difference is None and not pools and device.reserved_bytes != observed:
            difference = index, observed, device.reserved_bytes
        if isinstance(event, Alloc):
            block = replay.live[event.id]
            same += block is not None and block.address == recorded.addresses[index]
    return ReplayComparison(
        events=len(recorded.events),
        allocations=sum(isinstance(event, Alloc) for event in recorded.events),
        same_addresses=same,
        observed_peak_reserved_bytes=max(recorded.reserved_bytes, default=0),
        simulated_peak_reserved_bytes=device.peak_reserved_bytes,
        first_difference=difference,
    )


class _Reader:
    """Follows a history entry by entry."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.after: list[int] = []
        self.addresses: list[int | None] = []
        self.segments: list[tuple[int, int]] = []
        self._ranges: dict[int, int] = {}  # of segments that are held: address → bytes
        self._live: dict[int, Hashable] = {}
        self._pool: tuple[int, ...] = SHARED
        self._giving_back = False

    def read(self, index: int, entry: Mapping[str, Any]) -> None:
        """One entry of the trace."""
        action = entry.get("action")
        if action in GIVEN_BACK:
            self._give_back(index, _number(index, entry, "addr"), _number(index, entry, "size"))
            return
        if self._giving_back and action not in WITHOUT_EFFECT:
            self._giving_back = False
        if action in TAKEN:
            address, size = _number(index, entry, "addr"), _number(index, entry, "size")
            self._ranges[address] = size
            self.segments.append((address, size))
        elif action == "alloc":
            self._alloc(index, entry)
        elif action == "free_completed":
            address = _number(index, entry, "addr")
            if address not in self._live:
                raise ConfigError(_begun_late(index, address))
            self._note(Free(self._live.pop(address)))
        elif action not in WITHOUT_EFFECT:
            raise ConfigError(f"device_traces entry {index}: action={shown(action)} is not known")

    def _alloc(self, index: int, entry: Mapping[str, Any]) -> None:
        address = _number(index, entry, "addr")
        if not any(start <= address < start + size for start, size in self._ranges.items()):
            raise ConfigError(_begun_late(index, address))
        self._enter(tuple(entry.get("pool_id") or SHARED))
        name = (address, index)
        self._live[address] = name
        stream = entry.get("stream", 0)
        self._note(Alloc(name, _number(index, entry, "size"), stream), address)

    def _enter(self, pool: tuple[int, ...]) -> None:
        """Allocations of a private pool lie between its begin and its end."""
        if pool == self._pool:
            return
        if self._pool != SHARED:
            self._note(EndPool())
        if pool != SHARED:
            self._note(BeginPool(pool))
        self._pool = pool

    def _give_back(self, index: int, address: int, size: int) -> None:
        end, covered = address + size, 0
        for start, whole in list(self._ranges.items()):  # pages mapped apart may go together
            low, high = max(start, address), min(start + whole, end)
            if low >= high:
                continue
            covered += high - low
            del self._ranges[start]
            for left, right in ((start, low), (high, start + whole)):
                if right > left:
                    self._ranges[left] = right - left
        if covered != size:
            raise ConfigError(_begun_late(index, address))
        if not self._giving_back:
            self._giving_back = True
            self._note(EmptyCache())
        self.after[-1] = self._reserved

    def _note(self, event: Event, address: int | None = None) -> None:
        self.events.append(event)
        self.addresses.append(address)
        self.after.append(self._reserved)

    @property
    def _reserved(self) -> int:
        return sum(self._ranges.values())


def _entries(snapshot: Mapping[str, Any], device: int) -> Iterator[Mapping[str, Any]]:
    traces = snapshot.get("device_traces") if isinstance(snapshot, Mapping) else None
    if not isinstance(traces, list) or not 0 <= device < len(traces):
        raise ConfigError(
            f"snapshot has no device_traces of device={device}: what "
            "torch.cuda.memory._snapshot() returns"
        )
    for index, entry in enumerate(traces[device]):
        if not isinstance(entry, Mapping):
            raise ConfigError(f"device_traces entry {index}: {shown(entry)} is no entry")
        yield entry


def _number(index: int, entry: Mapping[str, Any], field: str) -> int:
    value = entry.get(field)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"device_traces entry {index}: {field}={shown(value)} is no size")
    return value


def _begun_late(index: int, address: int) -> str:
    return (
        f"device_traces entry {index}: address {address:#x} was there before the history began: "
        "call torch.cuda.memory._record_memory_history() before the first tensor, with enough "
        "max_entries"
    )
