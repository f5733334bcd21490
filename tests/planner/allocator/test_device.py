"""Hand-worked and published examples: what torch's own tests and users saw, step by step."""

from __future__ import annotations

import pytest

from planner import ConfigError
from planner.allocator import (
    Alloc,
    AllocatorSettings,
    BeginPool,
    DeviceAllocator,
    EmptyCache,
    EndPool,
    Free,
    Mark,
    OutOfMemoryError,
    RecordStream,
    ReleasePool,
    Synchronize,
    simulate,
)
from planner.allocator.settings import rounded, segment_bytes

KIB, MIB, GIB = 2**10, 2**20, 2**30
EXPANDABLE = AllocatorSettings(expandable_segments=True)


def test_a_forward_reserves_what_was_printed_for_it():
    """discuss.pytorch.org/t/138814: a conv and two max-pools with indices over 512 frames.

    In MB of 2²⁰, reserved/allocated: 296/294 before, 5014/465 after the first forward, 1644/465
    after empty_cache, 5688/465 after the second forward.
    """
    frames = 512 * 3 * 224 * 224 * 4
    conv = 512 * 28 * 222 * 222 * 4
    pooled = [512 * 28 * side * side * 4 for side in (111, 56)]
    weights = [Alloc("weight", 28 * 3 * 3 * 3 * 4), Alloc("bias", 28 * 4)]

    def forward(n):
        yield Alloc(("conv", n), conv)
        for i, (size, x) in enumerate(zip(pooled, (("conv", n), (0, n)), strict=True)):
            yield Alloc((i, n), size)
            yield Alloc(("indices", n), 2 * size)  # int64
            yield Free(("indices", n))
            yield Free(x)

    stats = simulate(
        [
            *weights,
            Alloc(("frames", 0), frames),
            Mark("before"),
            *forward(0),
            Mark("after 1"),
            EmptyCache(),
            Mark("emptied"),
            Alloc(("frames", 1), frames),
            Free(("frames", 0)),
            *forward(1),
            Free((1, 0)),  # pred
            Mark("after 2"),
        ]
    )
    seen = {
        mark.name: (mark.start.reserved_bytes // MIB, mark.start.allocated_bytes // MIB)
        for mark in stats.marks
    }
    assert seen == {
        "before": (296, 294),
        "after 1": (5014, 465),
        "emptied": (1644, 465),
        "after 2": (5688, 465),
    }


@pytest.mark.parametrize("settings", [AllocatorSettings(), EXPANDABLE])
@pytest.mark.parametrize(
    ("size", "mallocs", "reserved", "left", "pages", "pages_left"),
    [
        (512, 1, 2 * MIB, 2 * MIB, 2 * MIB, 2 * MIB),
        (MIB, 2, 4 * MIB, 2 * MIB, 4 * MIB, 2 * MIB),
        (MIB + 512, 1, 20 * MIB, 20 * MIB, 20 * MIB, 20 * MIB),
        (10 * MIB - 512, 2, 40 * MIB, 20 * MIB, 40 * MIB, 40 * MIB),
        (10 * MIB + 512, 3, 36 * MIB, 12 * MIB, 40 * MIB, 20 * MIB),
    ],
)
def test_graph_pools_keep_what_torchs_own_test_expects(
    settings, size, mallocs, reserved, left, pages, pages_left
):
    """pytorch test/test_cuda.py, test_graph_memory_stats_and_use_result_after_destroy_graph.

    `b = a.clone()`, then five times `b = b.clone() + 1` under capture: what the graph's pool holds
    after it, and once graph and cache are gone while b lives. Its expectations with expandable
    segments are `pages` and `pages_left`. The graph's seed and offset lie in another segment.
    """
    captured = [BeginPool("graph"), Alloc(0, size)]
    for n in range(1, 11, 2):
        captured += [Alloc(n, size), Alloc(n + 1, size), Free(n), Free(n - 1)]
    trace = [Alloc("a", size), Mark("captured"), *captured, EndPool(), EmptyCache(), Mark("after")]
    stats = simulate([*trace, ReleasePool("graph"), EmptyCache()], settings=settings)
    before, after = (mark.start for mark in stats.marks)
    expandable = settings.expandable_segments
    assert after.reserved_bytes - before.reserved_bytes == (pages if expandable else reserved)
    assert stats.end.reserved_bytes - before.reserved_bytes == (pages_left if expandable else left)
    assert after.allocated_bytes - before.allocated_bytes == size
    count = after.small_segments + after.large_segments
    assert count - before.small_segments - before.large_segments == (0 if expandable else mallocs)


@pytest.mark.parametrize(
    ("requested", "block"), [(0, 512), (1, 512), (512, 512), (513, 1024), (MIB + 1, MIB + 512)]
)
def test_requests_are_rounded_to_512_bytes(requested, block):
    assert rounded(requested) == block


@pytest.mark.parametrize(
    ("requested", "divisions", "block"),
    [
        (1200, 4, 1536),  # the source's comment says 1280, but only above 512 · divisions
        (5000, 4, 5120),  # 4096, 5120, 6144, 7168
        (84 * MIB, 4, 96 * MIB),  # test_cuda.py, test_allocator_settings: 21 Mi floats → 64·1.5
        (84 * MIB, 8, 88 * MIB),
        (400 * MIB, 2, 512 * MIB),
        (64 * MIB, 4, 64 * MIB),
    ],
)
def test_power_of_two_divisions_round_up_to_the_next_step(requested, divisions, block):
    assert rounded(requested, divisions) == block


@pytest.mark.parametrize(
    ("block", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
    ],
)
def test_segments_have_the_sizes_of_get_allocation_size(block, segment):
    assert segment_bytes(block, 20 * MIB) == segment


def test_a_rest_of_at_most_one_mib_stays_with_its_block():
    """33.7 MiB in a segment of 34 MiB own 34 MiB; requested bytes know the difference."""
    asked = int(33.7 * MIB)
    stats = simulate([Alloc("x", asked)])
    assert stats.end.allocated_bytes == stats.end.reserved_bytes == 34 * MIB
    assert stats.peak_requested_bytes == asked
    one_left = simulate([Alloc("x", 19 * MIB)])  # a segment of 20: exactly 1 MiB would be left
    assert one_left.end.allocated_bytes == 20 * MIB
    more_left = simulate([Alloc("x", 19 * MIB - 512)])
    assert more_left.end.allocated_bytes == 19 * MIB - 512


def test_the_smallest_block_that_fits_wins_and_the_lowest_address_among_equals():
    device = DeviceAllocator()
    blocks = [device.malloc(size * MIB) for size in (30, 24, 24, 26)]
    for block in blocks:
        device.free(block)
    low, high = sorted((blocks[1].address, blocks[2].address))
    assert device.malloc(24 * MIB).address == low
    assert device.malloc(23 * MIB).address == high
    assert device.malloc(25 * MIB).address == blocks[3].address
    assert device.device_allocs == 4


def test_neighbours_merge_and_a_split_segment_stays():
    trace = [Alloc("a", 5 * MIB), Alloc("b", 5 * MIB), Alloc("c", 5 * MIB), Free("a"), EmptyCache()]
    assert simulate(trace).end.reserved_bytes == 20 * MIB
    merged = simulate([*trace, Free("b"), Alloc("d", 10 * MIB)])
    assert merged.end.reserved_bytes == 20 * MIB
    assert merged.device_allocs == 1
    assert simulate([*trace, Free("b"), Free("c"), EmptyCache()]).end.reserved_bytes == 0


def test_small_and_large_requests_never_share_a_segment():
    stats = simulate([Alloc("big", 30 * MIB), Free("big"), Alloc("small", MIB)])
    assert stats.end.reserved_bytes == 32 * MIB
    assert (stats.end.small_segments, stats.end.large_segments) == (1, 1)


def test_streams_do_not_share_free_blocks():
    trace = [Alloc("a", 30 * MIB), Free("a"), Alloc("b", 30 * MIB, 1)]
    assert simulate(trace).end.reserved_bytes == 60 * MIB


def test_a_block_that_another_stream_uses_waits_for_it():
    used = [Alloc("a", 30 * MIB), RecordStream("a", 1), Free("a")]
    held = simulate([*used, Alloc("b", 30 * MIB)])
    assert held.end.reserved_bytes == 60 * MIB
    assert held.end.allocated_bytes == 30 * MIB  # allocated falls at once, as in free()
    assert simulate([*used, Synchronize(), Alloc("b", 30 * MIB)]).end.reserved_bytes == 30 * MIB
    own = [Alloc("a", 30 * MIB), RecordStream("a", 0), Free("a"), Alloc("b", 30 * MIB)]
    assert simulate(own).end.reserved_bytes == 30 * MIB


def test_the_cache_is_returned_before_memory_runs_out():
    trace = [Alloc("a", 30 * MIB), Free("a"), Alloc("b", 40 * MIB)]
    stats = simulate(trace, capacity_bytes=50 * MIB)
    assert stats.oom is None
    assert (stats.retries, stats.device_frees) == (1, 1)
    assert stats.end.reserved_bytes == stats.peak_reserved_bytes == 40 * MIB
    assert simulate(trace, capacity_bytes=70 * MIB).retries == 0


def test_a_request_that_does_not_fit_is_described():
    trace = [Alloc("a", 5 * MIB), Alloc("b", 5 * MIB), Free("a"), Alloc("c", 31 * MIB), Free("b")]
    stats = simulate(trace, capacity_bytes=50 * MIB)
    oom = stats.oom
    assert oom is not None
    assert (oom.id, oom.event, stats.events) == ("c", 3, 4)
    assert (oom.requested_bytes, oom.tried_bytes) == (31 * MIB, 32 * MIB)
    assert (oom.free_bytes, oom.allocated_bytes, oom.reserved_bytes) == (
        30 * MIB,
        5 * MIB,
        20 * MIB,
    )
    assert oom.largest_cached_bytes == 10 * MIB
    assert oom.message.startswith(
        "CUDA out of memory. Tried to allocate 32.00 MiB. The allocator has a total capacity of "
        "50.00 MiB of which 30.00 MiB is free. Of the allocated memory 5.00 MiB is allocated by "
        "PyTorch, and 15.00 MiB is reserved by PyTorch but unallocated."
    )


def test_a_block_freed_by_the_retry_is_not_searched_for_again():
    """pytorch issue 189504, open in 2.13: out of memory although the pool now has the block."""
    device = DeviceAllocator(capacity_bytes=20 * MIB)
    waiting = device.malloc(9 * MIB)
    device.malloc(4 * MIB)  # keeps the segment
    device.record_stream(waiting, 1)
    device.free(waiting)
    with pytest.raises(OutOfMemoryError):
        device.malloc(8 * MIB)
    assert device.malloc(8 * MIB).address == waiting.address


def test_growing_requests_fill_one_expandable_segment_where_segments_leave_slivers():
    """The case of Note [Expandable Segments]: each step asks a little more than the one before."""
    trace = [Alloc(0, 100 * MIB)]
    for step in range(1, 20):
        trace += [Alloc(step, (100 + 3 * step) * MIB), Free(step - 1)]
    default, expandable = simulate(trace), simulate(trace, settings=EXPANDABLE)
    assert default.peak_allocated_bytes >= expandable.peak_allocated_bytes == 311 * MIB
    assert expandable.peak_reserved_bytes < default.peak_reserved_bytes
    assert expandable.peak_reserved_bytes % (20 * MIB) == 0


def test_expandable_segments_map_2_mib_small_and_20_mib_large_pages():
    stats = simulate([Alloc("small", 1), Alloc("large", 21 * MIB)], settings=EXPANDABLE)
    assert stats.end.reserved_bytes == (2 + 40) * MIB
    assert stats.end.allocated_bytes == 512 + 21 * MIB  # rests are split from 512 bytes on


def test_only_whole_free_pages_are_unmapped():
    trace = [Alloc("a", 30 * MIB), Alloc("b", 15 * MIB), Free("a"), EmptyCache()]
    stats = simulate(trace, settings=EXPANDABLE)
    assert stats.end.reserved_bytes == 40 * MIB  # b spans pages 2 and 3, page 1 went
    again = simulate([*trace, Alloc("c", 18 * MIB)], settings=EXPANDABLE)
    assert again.end.reserved_bytes == 60 * MIB  # mapped again at the lowest address


def test_oversize_blocks_are_kept_for_large_requests():
    """max_split_size_mb=100: 90 MiB take no part of 120, 110 own 120, 95 of 100 are no oversize."""
    settings = AllocatorSettings(max_split_bytes=100 * MIB)
    freed = [Alloc("a", 120 * MIB), Free("a")]
    kept = simulate([*freed, Alloc("b", 90 * MIB)], settings=settings)
    assert kept.end.reserved_bytes == 210 * MIB
    whole = simulate([*freed, Alloc("b", 110 * MIB)], settings=settings)
    assert (whole.end.reserved_bytes, whole.end.allocated_bytes) == (120 * MIB, 120 * MIB)
    far = simulate([*freed, Alloc("b", 100 * MIB)], settings=settings)
    assert far.end.reserved_bytes == 220 * MIB  # 20 MiB more than asked: not within the rounding
    returned = simulate([*freed, Alloc("b", 90 * MIB)], settings=settings, capacity_bytes=150 * MIB)
    assert (returned.end.reserved_bytes, returned.retries) == (90 * MIB, 0)


def test_old_cached_segments_are_collected_above_the_threshold():
    settings = AllocatorSettings(garbage_collection_threshold=0.5)
    trace = [Alloc("a", 40 * MIB), Free("a"), Alloc("b", 42 * MIB), Free("b"), Alloc("c", 46 * MIB)]
    kept = simulate(trace, capacity_bytes=150 * MIB)
    assert kept.end.reserved_bytes == (40 + 42 + 46) * MIB
    gone = simulate(trace, settings=settings, capacity_bytes=150 * MIB)
    assert gone.end.reserved_bytes == (42 + 46) * MIB  # a was free for longer than b
    assert gone.retries == 0


def test_marks_count_peaks_from_where_they_stand():
    stats = simulate(
        [Mark("load"), Alloc("w", 40 * MIB), Mark("run"), Alloc("x", 10 * MIB), Free("x")]
    )
    load, run = stats.marks
    assert (load.name, load.start.reserved_bytes, load.peak_allocated_bytes) == (
        "load",
        0,
        40 * MIB,
    )
    assert (run.start.allocated_bytes, run.peak_allocated_bytes) == (40 * MIB, 50 * MIB)
    assert stats.peak_allocated_bytes == 50 * MIB


def test_the_timeline_has_a_row_for_every_event():
    stats = simulate([Alloc("a", 1000), Alloc("b", 30 * MIB), Free("a")], timeline=True)
    table = stats.timeline.table()
    assert list(table["allocated_bytes"]) == [1024, 1024 + 30 * MIB, 30 * MIB]
    assert list(table["requested_bytes"]) == [1000, 1000 + 30 * MIB, 30 * MIB]
    assert list(table["reserved_bytes"]) == [2 * MIB, 32 * MIB, 32 * MIB]
    assert simulate([], timeline=True).timeline.table().empty
    assert stats.fragmentation == pytest.approx(1 - (1024 + 30 * MIB) / (32 * MIB))


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ([Alloc("a", 1), Alloc("a", 1)], "event 1: 'a' is allocated twice"),
        ([Free("a")], "event 0: 'a' is not allocated"),
        ([RecordStream("a", 1)], "event 0: 'a' is not allocated"),
        ([Alloc("a", -1)], "size_bytes=-1 is not allowed"),
        ([EndPool()], "a private pool ends that did not begin"),
        ([BeginPool("g"), BeginPool("h")], "pool='h' begins inside pool='g'"),
        ([ReleasePool("g")], "pool='g' is not a private pool"),
        (["free"], "event 0: 'free' is not an allocator event"),
    ],
)
def test_a_trace_that_contradicts_itself_is_refused(trace, message):
    with pytest.raises(ConfigError, match=message):
        simulate(trace)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"large_segment_bytes": 5}, "large_segment_bytes=5"),
        ({"large_segment_bytes": 21 * MIB}, "a multiple of 2097152"),
        ({"max_split_bytes": 20 * MIB}, "max_split_bytes=20971520"),
        ({"roundup_power2_divisions": 3}, "0 or a power of two"),
        ({"garbage_collection_threshold": 1.0}, r"garbage_collection_threshold=1\.0"),
    ],
)
def test_settings_that_torch_refuses_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        AllocatorSettings(**fields)
