"""Memory histories of real runs → events for the simulator, and what was really reserved.

    with profiles.history.recorded() as history:     # before the first tensor
        ...                                          # the run
    history.write("run.json.gz")                     # one real run becomes a fixture for ever
    compare(read_recording("run.json.gz")).first_difference    # None: equal reserved bytes

Formats: the docstring of torch.cuda.memory._snapshot (2.13), as JSON, and history_format.py's, both
also gzipped. Pickled snapshots are not opened.
"""

from __future__ import annotations

import gzip
import json
import zlib
from bisect import bisect_right, insort
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
from profiles import history_format

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
    """The history of one device in a file of JSON (gzipped: .gz) in either format."""
    try:
        raw = Path(path).read_bytes()
        content = json.loads(gzip.decompress(raw) if Path(path).suffix == ".gz" else raw)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(f"snapshot={shown(str(path))} cannot be read as JSON: {error}") from None
    return recording(content, device=device)


def recording(snapshot: Mapping[str, Any], *, device: int = 0) -> Recording:
    """The events of a snapshot's device_traces, or of one that history_format made compact.

    A run of segments given back becomes one EmptyCache: whether the program asked for it or the
    allocator had to, it returned all it could. Raises ConfigError for another format, and for a
    history that began after the first tensor (or whose beginning was overwritten).
    """
    end_bytes = None
    if history_format.is_compact(snapshot):  # of one device
        end_bytes = snapshot.get("end_reserved_bytes")
        snapshot, device = history_format.expand(snapshot), 0
    state = _Reader()
    for index, entry in enumerate(_entries(snapshot, device)):
        state.read(index, entry)
    if end_bytes is not None and end_bytes != state.reserved_bytes:
        raise ConfigError(
            f"the history ends with {state.reserved_bytes} bytes reserved, the allocator had "
            f"{end_bytes}: it is not complete"
        )
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
        self.reserved_bytes = 0
        self._ranges: dict[int, int] = {}  # of segments that are held: address → bytes
        self._starts: list[int] = []  # their addresses, sorted
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
            self._hold(address, size)
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
        if not self._is_held(address):
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
            self._drop(start)
            for left, right in ((start, low), (high, start + whole)):
                if right > left:
                    self._hold(left, right - left)
        if covered != size:
            raise ConfigError(_begun_late(index, address))
        if not self._giving_back:
            self._giving_back = True
            self._note(EmptyCache())
        self.after[-1] = self.reserved_bytes

    def _note(self, event: Event, address: int | None = None) -> None:
        self.events.append(event)
        self.addresses.append(address)
        self.after.append(self.reserved_bytes)

    def _hold(self, start: int, size: int) -> None:
        if start in self._ranges:
            self._drop(start)
        self._ranges[start] = size
        insort(self._starts, start)
        self.reserved_bytes += size

    def _drop(self, start: int) -> None:
        self.reserved_bytes -= self._ranges.pop(start)
        del self._starts[bisect_right(self._starts, start) - 1]

    def _is_held(self, address: int) -> bool:
        index = bisect_right(self._starts, address) - 1
        return index >= 0 and address < self._starts[index] + self._ranges[self._starts[index]]


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
