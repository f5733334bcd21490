"""Histories in torch's own shape, made small and replayed; torch's recording itself is faked."""

from __future__ import annotations

import gzip
import json
import pickletools
from contextlib import nullcontext

import pytest
import torch
from torch.cuda import _memory_viz

from planner import ConfigError
from planner.allocator import BeginPool
from profiles import history, history_format
from profiles.allocator_replay import compare, read_recording, recording

MIB = 2**20
SMALL, LARGE, OTHER = 0x7F4A00000000, 0x7F4A10000000, 0x7F49F0000000
SIDE_STREAM = 0x55D0C0FFEE00


def entry(action, addr, size, *, stream=0, **more):
    """As torch/csrc/cuda/memory_snapshot.cpp writes one; no frames where context=None."""
    place = {"device_free": addr} if action == "oom" else {"addr": addr}
    return {"action": action, **place, "size": size, "stream": stream, "time_us": 17, **more}


def freed(addr, size):
    return [entry("free_requested", addr, size), entry("free_completed", addr, size)]


def segment(address, size, *, pool=(0, 0), stream=0):
    return {
        "device": 0,
        "address": address,
        "total_size": size,
        "allocated_size": 0,
        "active_size": 0,
        "requested_size": 0,
        "stream": stream,
        "segment_type": "large" if size > 2 * MIB else "small",
        "segment_pool_id": pool,
        "is_expandable": False,
        "frames": [],
        "blocks": [
            {
                "address": address,
                "size": size,
                "requested_size": size,
                "state": "inactive",
                "frames": [],
            }
        ],
    }


def snapshot_of(trace, segments):
    return {
        "segments": segments,
        "device_traces": [trace],
        "allocator_settings": {"PYTORCH_CUDA_ALLOC_CONF": "", "expandable_segments": False},
        "external_annotations": [],
    }


@pytest.fixture
def snapshot():
    """Two pools, two streams, a freed block taken again, an emptied cache and an OOM."""
    trace = [
        entry("segment_alloc", SMALL, 2 * MIB),
        entry("alloc", SMALL, 4),
        entry("alloc", SMALL + 512, 1000),
        entry("segment_alloc", LARGE, 20 * MIB),
        entry("alloc", LARGE, 5 * MIB),
        entry("alloc", LARGE + 5 * MIB, 3 * MIB + 8),
        *freed(LARGE, 5 * MIB),
        entry("alloc", LARGE, 5 * MIB - 100),
        *freed(SMALL, 4),
        entry("segment_alloc", OTHER, 2 * MIB, stream=SIDE_STREAM),
        entry("alloc", OTHER, 512, stream=SIDE_STREAM),
        entry("oom", 7 * MIB, 10**12),
        *freed(OTHER, 512),
        entry("segment_free", OTHER, 2 * MIB, stream=SIDE_STREAM),
        entry("snapshot", 0, 0),
    ]
    return snapshot_of(trace, [segment(SMALL, 2 * MIB), segment(LARGE, 20 * MIB)])


@pytest.fixture
def cuda(monkeypatch, snapshot):
    """torch's recording, faked: the calls in order."""
    calls = []

    def record(enabled="all", **options):
        calls.append((enabled, options))

    def take():
        calls.append("snapshot")
        return snapshot

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", take)
    return calls


def test_the_compact_history_replays_as_the_snapshot_does(tmp_path, snapshot):
    path = tmp_path / "run.json.gz"
    history_format.write(path, history_format.compact(snapshot, about={"model": "gpt2"}))
    whole, small = recording(snapshot), read_recording(path)
    assert small.reserved_bytes == whole.reserved_bytes
    assert small.segments == whole.segments
    assert small.addresses == whole.addresses
    assert [type(event) for event in small.events] == [type(event) for event in whole.events]
    result = compare(small)
    assert result == compare(whole)
    assert result.first_difference is None
    assert result.same_addresses == result.allocations == 6


def test_the_same_history_gives_the_same_bytes_and_says_what_ran(tmp_path, snapshot):
    for name in ("a", "b"):
        compacted = history_format.compact(snapshot, about={"model": "gpt2"})
        history_format.write(tmp_path / name, compacted)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    content = json.loads(gzip.decompress((tmp_path / "a").read_bytes()))
    assert content["about"] == {"model": "gpt2"}
    assert content["end_reserved_bytes"] == 22 * MIB
    assert content["streams"] == [0, 5, 1, 1]


def test_entries_without_a_pool_get_their_segments():
    trace = [
        entry("segment_alloc", SMALL, 2 * MIB),
        entry("alloc", SMALL, 512),
        entry("segment_alloc", OTHER, 2 * MIB),
        entry("alloc", OTHER, 512),
        entry("alloc", SMALL + 512, 512),
    ]
    segments = [segment(SMALL, 2 * MIB), segment(OTHER, 2 * MIB, pool=(0, 1))]
    recorded = recording(history_format.compact(snapshot_of(trace, segments)))
    assert BeginPool((0, 1)) in recorded.events
    assert compare(recorded).first_difference is None


def test_a_history_that_lost_its_end_is_refused(snapshot):
    snapshot["segments"].append(segment(OTHER, 32 * MIB))
    with pytest.raises(ConfigError, match="it is not complete"):
        recording(history_format.compact(snapshot))


def test_a_history_that_began_late_is_refused(snapshot):
    del snapshot["device_traces"][0][:2]
    with pytest.raises(ConfigError, match="was there before the history began"):
        history_format.compact(snapshot)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"actions": "AAAA"},
        {"actions": "?"},
        {"frees": [99, 0, 0]},
        {"sizes": None},
        {"streams": [0]},
    ],
)
def test_damaged_files_are_refused(snapshot, change):
    with pytest.raises(ConfigError, match=r"schema|before the history began"):
        recording(history_format.compact(snapshot) | change)


def test_what_is_not_gzip_is_refused(tmp_path):
    for content in (b"{}", gzip.compress(b"{}")[:-3], gzip.compress(b"no json")):
        (tmp_path / "run.json.gz").write_bytes(content)
        with pytest.raises(ConfigError, match="cannot be read as JSON"):
            read_recording(tmp_path / "run.json.gz")


def test_recording_begins_first_and_takes_its_snapshot_before_it_stops(cuda, tmp_path):
    with history.recorded() as recorded:
        assert cuda == [
            ("all", {"context": None, "stacks": "python", "max_entries": history.MAX_ENTRIES})
        ]
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = recorded.snapshot
    assert cuda[1:] == ["snapshot", (None, {})]
    recorded.write(tmp_path / "new" / "run.json.gz", about={"model": "gpt2"})
    assert compare(read_recording(tmp_path / "new" / "run.json.gz")).first_difference is None


def test_a_run_out_of_memory_leaves_its_history(cuda):
    with pytest.raises(torch.OutOfMemoryError), history.recorded() as recorded:
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert recorded.snapshot["device_traces"]
    assert cuda[-1] == (None, {})


def test_a_snapshot_that_fails_does_not_hide_why_the_run_did(cuda, monkeypatch):
    def fail():
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(torch.cuda.memory, "_snapshot", fail)
    with pytest.raises(ZeroDivisionError), history.recorded():
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="is gone"), history.recorded():
        pass
    assert cuda[-1] == (None, {})


def test_recording_refuses_to_begin_while_something_is_held(cuda, monkeypatch):
    cleared = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: cleared.append("cache"))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 32 * MIB)
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: cleared.append("cuBLAS"), raising=False)
    with pytest.raises(ConfigError, match="33,554,432 bytes already"), history.recorded():
        pass
    assert cleared == ["cuBLAS", "cache"]
    assert cuda == []


def test_the_pickle_is_what_memory_viz_reads(cuda, tmp_path, snapshot):
    with history.recorded() as recorded:
        pass
    recorded.write_pickle(tmp_path / "new" / "run.pickle")
    codes = list(pickletools.genops((tmp_path / "new" / "run.pickle").read_bytes()))
    assert codes[0][0].name == "PROTO"
    assert codes[0][1] == 4
    assert "cudaMalloc" in _memory_viz.trace(snapshot)


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory")])
def test_a_run_is_drawn_even_if_it_fails(cuda, tmp_path, monkeypatch, error):
    monkeypatch.setattr(history, "find_device", torch.device)
    path = tmp_path / "new" / "run.pickle"
    with nullcontext() if error is None else pytest.raises(torch.OutOfMemoryError):  # noqa: SIM117
        with history.drawn_by_memory_viz(path, device="cuda"):
            if error is not None:
                raise error
    assert cuda[0][1]["context"] == "alloc"
    opcodes = [op.name for op, _, _ in pickletools.genops(path.read_bytes())]
    assert opcodes[0] == "PROTO"


def test_a_path_that_cannot_be_written_is_refused_before_the_run(monkeypatch):
    monkeypatch.setattr(history, "find_device", torch.device)
    with (
        pytest.raises(ConfigError, match=r"--memory-viz=/proc/run\.pickle cannot be written"),
        history.drawn_by_memory_viz("/proc/run.pickle", device="cuda"),
    ):
        pytest.fail("nothing runs")
