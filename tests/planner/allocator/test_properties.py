"""Random traces: nothing overlaps, nothing is lost, and a naive reference does the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.allocator import AllocatorSettings, DeviceAllocator, OutOfMemoryError
from tests.planner.allocator.reference import FullError, Reference, rising
from tests.properties import examples

MIB = 2**20

EDGES = [0, 1, 511, 512, 513, MIB - 512, MIB, MIB + 1, 10 * MIB - 512, 10 * MIB - 511, 10 * MIB]
SIZES = st.one_of(
    st.sampled_from([*EDGES[1:], 2 * MIB, 19 * MIB, 20 * MIB + 1, 34 * MIB - 300_000]),
    st.integers(1, 3000),
    st.integers(1, 3 * MIB),
    st.integers(1, 80 * MIB),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("malloc"), SIZES, st.sampled_from([0, 0, 0, 7])),
        st.tuples(st.just("free"), st.integers(0, 10**6), st.just(0)),
        st.tuples(st.just("empty"), st.just(0), st.just(0)),
    ),
    min_size=40,
    max_size=100,
)


def mixed(steps):
    """The same steps with fewer empty_caches: each hides what lies before it."""
    return [step for i, step in enumerate(steps) if step[0] != "empty" or i % 8 == 0]


def check(device, live):
    """Blocks tile their segments: disjoint, nothing lost, no two free ones side by side."""
    blocks = sorted([*live.values(), *device.free_blocks()], key=lambda b: b.address)
    for one, other in pairwise(blocks):
        assert one.address + one.size <= other.address
        adjacent = one.address + one.size == other.address and one.segment == other.segment
        assert not (adjacent and one.pool is other.pool and not one.busy and not other.busy)
        if adjacent:
            assert one.next is other
            assert other.previous is one
    assert sum(b.size for b in blocks) == device.reserved_bytes
    assert sum(b.size for b in live.values()) == device.allocated_bytes
    assert sum(b.requested_bytes for b in live.values()) == device.requested_bytes
    assert all(b.size >= b.requested_bytes and b.size % 512 == 0 for b in live.values())


@pytest.mark.parametrize("expandable", [False, True])
@pytest.mark.parametrize("capacity", [2000 * MIB, 120 * MIB])
@examples(60)
@given(steps=STEPS.map(mixed))
def test_random_traces_do_what_the_naive_reference_does(expandable, capacity, steps):
    device = DeviceAllocator(
        AllocatorSettings(expandable_segments=expandable),
        capacity_bytes=capacity,
        place=rising(),
    )
    naive = Reference(expandable=expandable, capacity=capacity)
    live = {}
    for number, (kind, size, stream) in enumerate(steps):
        if kind == "malloc":
            try:
                block = device.malloc(size, stream)
            except OutOfMemoryError:
                with pytest.raises(FullError):
                    naive.malloc(number, size, stream)
                check(device, live)
                continue
            assert (block.address, block.size) == naive.malloc(number, size, stream)
            live[number] = block
        elif kind == "free" and live:
            gone = sorted(live)[size % len(live)]
            device.free(live.pop(gone))
            naive.free(gone)
        elif kind == "empty":
            device.empty_cache()
            naive.empty_cache()
        assert (device.allocated_bytes, device.reserved_bytes) == (naive.allocated, naive.reserved)
        check(device, live)
    for block in live.values():
        device.free(block)
    device.empty_cache()
    assert (device.allocated_bytes, device.requested_bytes, device.reserved_bytes) == (0, 0, 0)
    assert device.segments == {True: 0, False: 0}
    assert list(device.free_blocks()) == []
