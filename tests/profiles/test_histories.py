"""Histories of an H200's allocator against the simulator: the very blocks, the very segments."""

import gzip
import json
import re
from pathlib import Path

import pytest

from planner import reserved
from planner.allocator import Alloc, DeviceAllocator, Free
from planner.allocator.settings import SMALL_BYTES, rounded
from planner.allocator.simulate import Replay
from profiles.allocator_replay import compare, read_recording
from profiles.records import DATA
from profiles.suite_run import needed
from profiles.suites import suite_points
from tests.planner.allocator.reference import rising

HISTORIES = sorted((DATA / "histories").glob("*.json.gz"))


def test_there_are_histories_of_inference_and_training():
    assert len(HISTORIES) == 16
    assert sum("training" in path.name for path in HISTORIES) == 7
    models = {re.split("-(?:transformers|attnlab)-", path.name)[0] for path in HISTORIES}
    assert len(models) == 11


def test_readmes_count_of_allocations_is_theirs():
    events = (event for path in HISTORIES for event in read_recording(path).events)
    assert sum(isinstance(event, Alloc) for event in events) == 154_552


def test_rising_addresses_would_reserve_as_much_in_half_of_them():
    """What addresses.py says of them, and why ours go downwards."""
    equal = 0
    for path in HISTORIES:
        recorded = read_recording(path)
        device = DeviceAllocator(place=rising())
        Replay(device).feed(recorded.events)
        equal += device.peak_reserved_bytes == max(recorded.reserved_bytes)
    assert equal == 8


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.name.partition(".")[0])
def test_every_allocation_gets_the_block_it_had(path: Path):
    found = compare(read_recording(path))
    assert found.first_difference is None
    assert found.same_addresses == found.allocations > 1000
    assert found.simulated_peak_reserved_bytes == found.observed_peak_reserved_bytes


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.name.partition(".")[0])
def test_segments_laid_out_by_our_rule_reserve_as_much(path: Path):
    recorded = read_recording(path)
    device = DeviceAllocator()
    replay = Replay(device)
    replay.feed(recorded.events)
    assert device.peak_reserved_bytes == max(recorded.reserved_bytes)


DROPPED_OUT = "gpt2"
"""Ran with the dropout of its config, which is not planned."""


def requests(events, *, above_bytes=SMALL_BYTES):
    """Requests of more than so many bytes in order, between them the sizes that were let go of."""
    sizes, made, freed = {}, [], []
    for event in events:
        if isinstance(event, Alloc):
            sizes[event.id] = rounded(event.size_bytes)
            if sizes[event.id] > above_bytes:
                made += [sorted(freed), sizes[event.id]]
                freed = []
        elif isinstance(event, Free) and sizes.get(event.id, 0) > above_bytes:
            freed.append(sizes[event.id])
    return [*made, sorted(freed)][1:]


def planned_events(path, monkeypatch):
    """What the planner asks its simulated allocator for, from the prompt on."""
    about = json.loads(gzip.decompress(path.read_bytes()))["about"]
    (point,) = (p for p in suite_points("allocator") if p.name == about["point"])
    fed = []

    class Listening(Replay):
        def feed(self, events):
            kept = list(events)
            fed.extend(kept)
            super().feed(kept)

    monkeypatch.setattr(reserved, "Replay", Listening)
    reserved.reserved.cache_clear()
    assert needed(point, "h200").memory.peak_reserved_bytes
    first = next(i for i, e in enumerate(fed) if e.id in ("prompt", "token ids"))
    return fed[first:]


@pytest.mark.parametrize(
    "path",
    [path for path in HISTORIES if not path.name.startswith(DROPPED_OUT)],
    ids=lambda path: path.name.partition(".")[0],
)
def test_what_is_planned_asks_for_what_the_run_asked_for(path: Path, monkeypatch):
    """Every request above 1 MiB, in order, and what is let go of between two of them.

    Before the prompt there are weights, and behind the run whatever ends it.
    """
    planned = requests(planned_events(path, monkeypatch))[:-1]
    seen = requests(read_recording(path).events)[:-1]
    assert len(planned) > 1000
    assert seen[-len(planned) :] == planned


@pytest.mark.parametrize("model", ["deepseek-v2-lite", "qwen1-5-moe", "olmo2"])
def test_a_prefill_asks_for_every_byte_in_order(model, monkeypatch):
    """Small requests too: those of sorts, of sums over experts, of grouped products."""
    (path,) = (path for path in HISTORIES if path.name.startswith(model))
    events = planned_events(path, monkeypatch)
    ends = next(i for i, e in enumerate(events) if isinstance(e.id, tuple) and e.id[0] == "token")
    planned = requests(events[:ends], above_bytes=0)[1:-1]  # from behind the prompt
    seen = requests(read_recording(path).events, above_bytes=0)
    begins = (i for i in range(len(seen)) if seen[i : i + 20] == planned[:20])
    start = next(begins)
    assert len(planned) > 1000
    assert seen[start : start + len(planned)] == planned
