"""An allocator history made small: what a replay needs of a snapshot, in columns.

A training step of an 8B model is 10⁵ events; as torch tells them they are tens of megabytes, as
columns of small integers some hundred kilobytes of gzip. Kept are allocations, completed frees, and
segments taken and given back; stacks, times and what has no effect are left out.

    actions    one letter an event: A alloc, F free, S R segment allocated, freed, M U (un)mapped
    addresses  of all but F: (address − base) / unit, each less the one before it
    sizes      of all but F, in bytes as they were asked for
    frees      of F: how many live allocations ago the freed one was made (0: the last)
    streams, pools  of A: [value, how often in a row, …]; streams numbered, 0 is the default one
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

from planner.errors import ConfigError, shown

FORMAT = "allocator-history"
SCHEMA = 1

LETTERS = {
    "alloc": "A",
    "free_completed": "F",
    "segment_alloc": "S",
    "segment_free": "R",
    "segment_map": "M",
    "segment_unmap": "U",
}
ACTIONS = {letter: action for action, letter in LETTERS.items()}

SHARED = (0, 0)


def compact(
    snapshot: Mapping[str, Any], *, device: int = 0, about: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One device's history out of torch.cuda.memory._snapshot(), as plain JSON values.

    `about` is kept as it is: what ran, on what. An entry without a pool gets that of the segment it
    lies in, where the segment is still there at the end: not every torch says it of each entry.
    ConfigError when something is freed that was there before the history began.
    """
    entries = [e for e in snapshot["device_traces"][device] if e["action"] in LETTERS]
    segments = [s for s in snapshot.get("segments", ()) if s.get("device", device) == device]
    pool_of = _pools_at_the_end(segments)
    streams: dict[int, int] = {0: 0}
    live: list[int] = []
    frees, alloc_streams, alloc_pools = [], [], []
    for index, entry in enumerate(entries):
        address = entry["addr"]
        if entry["action"] == "alloc":
            live.append(address)
            alloc_streams.append(streams.setdefault(entry.get("stream", 0), len(streams)))
            alloc_pools.append(list(entry.get("pool_id") or pool_of(address)))
        elif entry["action"] == "free_completed":
            back = next((i for i, a in enumerate(reversed(live)) if a == address), None)
            if back is None:
                raise ConfigError(
                    f"event {index}: address {address:#x} was there before the history began"
                )
            frees.append(back)
            del live[-1 - back]
    placed = [e for e in entries if e["action"] != "free_completed"]
    base = min((e["addr"] for e in placed), default=0)
    offsets = [e["addr"] - base for e in placed]
    unit = math.gcd(*offsets) or 1
    return {
        "format": FORMAT,
        "schema": SCHEMA,
        "about": dict(about or {}),
        "allocator_settings": dict(snapshot.get("allocator_settings") or {}),
        "end_reserved_bytes": sum(s["total_size"] for s in segments) if segments else None,
        "base": base,
        "unit": unit,
        "actions": "".join(LETTERS[e["action"]] for e in entries),
        "addresses": [b - a for a, b in pairwise([0, *(o // unit for o in offsets)])],
        "sizes": [e["size"] for e in placed],
        "frees": frees,
        "streams": _runs(alloc_streams),
        "pools": _runs(alloc_pools),
    }


def is_compact(content: Any) -> bool:
    """Whether this JSON is a compacted history, of whatever schema."""
    return isinstance(content, Mapping) and content.get("format") == FORMAT


def expand(content: Mapping[str, Any]) -> dict[str, Any]:
    """A snapshot as torch would have given it, as far as it was kept, of a device 0."""
    if content.get("schema") != SCHEMA:
        raise ConfigError(
            f"schema={shown(content.get('schema'))} is not known: this reads {SCHEMA}"
        )
    try:
        return {"segments": [], "device_traces": [list(_entries(content))]}
    except (KeyError, TypeError, ValueError, IndexError, StopIteration, RuntimeError) as error:
        raise ConfigError(f"not a history of schema {SCHEMA}: {error!r}") from None


def write(path: str | Path, content: Mapping[str, Any]) -> None:
    """The compacted history as .json.gz; the same history gives the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, separators=(",", ":"), allow_nan=False, default=str)
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))


def _entries(content: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    base, unit = content["base"], content["unit"]
    addresses = (base + unit * offset for offset in accumulate(content["addresses"]))
    sizes, frees = iter(content["sizes"]), iter(content["frees"])
    streams, pools = _expanded(content["streams"]), _expanded(content["pools"])
    live: list[tuple[int, int]] = []
    for letter in content["actions"]:
        if letter == "F":
            address, size = live.pop(-1 - next(frees))
            yield {"action": ACTIONS[letter], "addr": address, "size": size, "stream": 0}
            continue
        address, size = next(addresses), next(sizes)
        entry = {"action": ACTIONS[letter], "addr": address, "size": size, "stream": 0}
        if letter == "A":
            entry |= {"stream": next(streams), "pool_id": tuple(next(pools))}
            live.append((address, size))
        yield entry


def _pools_at_the_end(segments: Iterable[Mapping[str, Any]]) -> Any:
    private = [
        (s["address"], s["address"] + s["total_size"], tuple(s["segment_pool_id"]))
        for s in segments
        if tuple(s.get("segment_pool_id") or SHARED) != SHARED
    ]
    return lambda address: next((p for low, high, p in private if low <= address < high), SHARED)


def _runs(values: Iterable[Any]) -> list[Any]:
    return [item for value, run in groupby(values) for item in (value, sum(1 for _ in run))]


def _expanded(runs: list[Any]) -> Iterator[Any]:
    for value, count in zip(runs[::2], runs[1::2], strict=True):
        yield from [value] * count
