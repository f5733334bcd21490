"""A history in torch's own format: torch's tools read it, and so does the importer."""

from __future__ import annotations

import json

import pytest
from torch.cuda import _memory_viz

from planner import ConfigError
from planner.allocator import Alloc, AllocatorSettings, EmptyCache, Free
from profiles.allocator_replay import compare, read_recording, recording

MIB = 2**20
SMALL, FRAMES, CONV, POOLED, INDICES, MORE = (
    0x7F0000000000 + n * 2**36
    for n in (0, 1, 5, 3, 4, 2)  # as a driver gives them: unordered
)


def entry(action, addr, size, **more):
    frames = [{"filename": "train.py", "line": 1, "name": "train"}]
    return {"action": action, "addr": addr, "size": size, "stream": 0, "frames": frames, **more}


def freed(addr, size):
    return [entry("free_requested", addr, size), entry("free_completed", addr, size)]


def snapshot(trace):
    return {"segments": [], "device_traces": [trace]}


@pytest.fixture
def forward():
    """discuss.pytorch.org/t/138814 as the allocator would have recorded it; sizes by hand.

    reserved: 296 MiB before, 5014 after the first forward, 1644 when emptied.
    """
    frames, conv = 512 * 3 * 224 * 224 * 4, 512 * 28 * 222 * 222 * 4
    big, small = (512 * 28 * side * side * 4 for side in (111, 56))
    return [
        entry("segment_alloc", SMALL, 2 * MIB),
        entry("alloc", SMALL, 28 * 27 * 4),
        entry("alloc", SMALL + 3072, 28 * 4),
        entry("segment_alloc", FRAMES, 294 * MIB),
        entry("alloc", FRAMES, frames),
        entry("segment_alloc", CONV, 2696 * MIB),
        entry("alloc", CONV, conv),
        entry("segment_alloc", POOLED, 674 * MIB),
        entry("alloc", POOLED, big),
        entry("segment_alloc", INDICES, 1348 * MIB),
        entry("alloc", INDICES, 2 * big),
        *freed(INDICES, 2 * big),
        *freed(CONV, conv),
        entry("alloc", INDICES, small),
        entry("alloc", INDICES + small, 2 * small),
        *freed(INDICES + small, 2 * small),
        *freed(POOLED, big),
        entry("snapshot", 0, 0),
        entry("segment_free", POOLED, 674 * MIB),
        entry("segment_free", CONV, 2696 * MIB),
        entry("segment_alloc", MORE, 1200 * MIB),
        entry("alloc", MORE, 1199 * MIB),
    ]


def test_a_history_becomes_events_and_what_was_reserved(forward):
    recorded = recording(snapshot(forward))
    assert sum(isinstance(event, Alloc) for event in recorded.events) == 9
    assert sum(isinstance(event, Free) for event in recorded.events) == 4
    empties = [i for i, event in enumerate(recorded.events) if isinstance(event, EmptyCache)]
    assert len(empties) == 1
    assert [reserved // MIB for reserved in recorded.reserved_bytes] == [
        *(2, 2, 296, 2992, 3666, 5014),
        *(5014,) * 6,
        *(1644, 2844),
    ]


def test_the_simulator_gives_the_same_reserved_bytes_and_the_same_blocks(forward):
    result = compare(recording(snapshot(forward)))
    assert result.first_difference is None
    assert result.observed_peak_reserved_bytes == result.simulated_peak_reserved_bytes
    assert result.observed_peak_reserved_bytes == 5014 * MIB
    assert result.same_addresses == result.allocations == 9


def test_torchs_own_tools_read_the_same_history(forward):
    text = _memory_viz.trace(snapshot(forward))
    assert "cudaMalloc" in text
    assert "cudaFree" in text


def test_a_difference_is_found_where_it_begins(forward):
    result = compare(recording(snapshot(forward)), AllocatorSettings(expandable_segments=True))
    index, observed, simulated = result.first_difference
    assert (index, observed // MIB, simulated // MIB) == (2, 296, 302)


def test_blocks_of_a_graph_come_from_its_own_pool():
    trace = [
        entry("segment_alloc", SMALL, 2 * MIB, pool_id=(0, 0)),
        entry("alloc", SMALL, 512, pool_id=(0, 0)),
        entry("segment_alloc", MORE, 2 * MIB, pool_id=(0, 1)),
        entry("alloc", MORE, 512, pool_id=(0, 1)),
        entry("alloc", SMALL + 512, 512, pool_id=(0, 0)),
    ]
    result = compare(recording(snapshot(trace)))
    assert result.first_difference is None
    assert result.same_addresses == 3


def test_pages_that_were_mapped_apart_may_be_unmapped_together():
    page = 20 * MIB
    trace = [
        entry("segment_map", MORE, page),
        entry("alloc", MORE, 15 * MIB),
        entry("segment_map", MORE + page, 2 * page),
        entry("alloc", MORE + 15 * MIB, 40 * MIB),
        *freed(MORE + 15 * MIB, 40 * MIB),
        entry("segment_unmap", MORE + page, 2 * page),
        *freed(MORE, 15 * MIB),
        entry("segment_map", MORE + page, page),
        entry("alloc", MORE, 40 * MIB),
        *freed(MORE, 40 * MIB),
        entry("segment_unmap", MORE, 2 * page),
    ]
    recorded = recording(snapshot(trace))
    assert [reserved // MIB for reserved in recorded.reserved_bytes] == [
        *(20, 60, 60, 20, 20, 40, 40, 0),
    ]
    assert compare(recorded, AllocatorSettings(expandable_segments=True)).first_difference is None


def test_histories_are_read_from_json(tmp_path, forward):
    path = tmp_path / "snapshot.json"
    path.write_text(json.dumps(snapshot(forward)))
    assert compare(read_recording(path)).first_difference is None
    (tmp_path / "snapshot.pickle").write_bytes(b"\x80\x04}\x94.")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_recording(tmp_path / "snapshot.pickle")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no device_traces of device=0"),
        ([], "no device_traces of device=0"),
        (snapshot(["alloc"]), "entry 0: 'alloc' is no entry"),
        (snapshot([entry("teleport", 0, 0)]), "entry 0: action='teleport' is not known"),
        (snapshot([entry("segment_alloc", 0, "2")]), "entry 0: size='2' is no size"),
        (snapshot([entry("alloc", 4096, 512)]), "entry 0: address 0x1000 was there before"),
        (snapshot([entry("free_completed", 4096, 512)]), "was there before the history began"),
        (snapshot([entry("segment_free", 4096, 512)]), "_record_memory_history"),
    ],
)
def test_other_formats_and_histories_that_begin_late_are_refused(content, message):
    with pytest.raises(ConfigError, match=message):
        recording(content)
