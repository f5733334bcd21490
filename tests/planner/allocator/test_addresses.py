"""Where the driver puts segments, as histories of real allocators show it."""

from itertools import pairwise

from planner.allocator.addresses import RANGE_BYTES, AddressSpace

MIB = 2**20


def test_ranges_go_downwards_and_their_rests_are_used_first():
    """The first segments of phi-2 on an H200, from the first one's address on, in MiB."""
    space = AddressSpace()
    first = space.take(250 * MIB)
    assert space.take(14 * MIB) > first + 256 * MIB  # beside the context, above all others
    sizes = (14, 14, 14, 50, 50, 14, 14, 14)
    offsets = [(space.take(size * MIB) - first) // MIB for size in sizes]
    assert offsets == [-32, -18, -64, -128, -192, -142, -78, -50]


def test_no_two_allocations_overlap():
    space = AddressSpace()
    sizes = [2 * MIB * (1 + 7 * i % 40) for i in range(200)]
    taken = sorted((space.take(size), size) for size in sizes)
    assert all(a + n <= b for (a, n), (b, _) in pairwise(taken))


def test_a_whole_range_leaves_nothing():
    space = AddressSpace()
    space.take(24 * MIB)  # beside the context
    assert space.take(RANGE_BYTES) - space.take(2 * MIB) == RANGE_BYTES
