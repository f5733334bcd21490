"""Histories of an H200's allocator against the simulator: the very blocks, the very segments."""

from pathlib import Path

import pytest

from planner.allocator import DeviceAllocator
from planner.allocator.simulate import Replay
from profiles.allocator_replay import compare, read_recording
from profiles.records import DATA

HISTORIES = sorted((DATA / "histories").glob("*.json.gz"))
ADDRESSES_DIFFER = ("deepseek-v2-lite",)
"""Where the driver put a segment elsewhere than we do, and a tie between blocks went the other
way."""


def test_there_are_histories_of_inference_and_training():
    assert len(HISTORIES) == 16
    assert sum("training" in path.name for path in HISTORIES) == 7


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
    observed = max(recorded.reserved_bytes)
    if path.name.startswith(ADDRESSES_DIFFER):
        assert device.peak_reserved_bytes == pytest.approx(observed, rel=1e-4)
    else:
        assert device.peak_reserved_bytes == observed
