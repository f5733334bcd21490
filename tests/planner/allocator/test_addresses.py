"""Where the driver puts segments, as histories of real allocators show it."""

from itertools import pairwise

from planner.allocator.addresses import RANGE_BYTES, AddressSpace

MIB = 2**20


def test_ranges_go_downwards_and_their_rests_are_used_first():
    """The first segments of phi-2 on an H200: 14, 50, 50, 14, 14, 14 MiB."""
    space = AddressSpace()
    first, wide, below, *small = (space.take(n * MIB) for n in (14, 50, 50, 14, 14, 14))
    assert first - wide == 64 * MIB
    assert wide - below == 64 * MIB
    assert [a - b for a, b in zip(small, (below, wide, first), strict=True)] in (
        [50 * MIB, 50 * MIB, 14 * MIB],
        [50 * MIB, 14 * MIB, 14 * MIB],
    )


def test_no_two_allocations_overlap():
    space = AddressSpace()
    sizes = [2 * MIB * (1 + 7 * i % 40) for i in range(200)]
    taken = sorted((space.take(size), size) for size in sizes)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(taken))


def test_a_whole_range_leaves_nothing():
    space = AddressSpace()
    assert space.take(RANGE_BYTES) - space.take(2 * MIB) == RANGE_BYTES
