"""Expandable segments: one range of addresses for a (pool, stream), pages mapped as it grows.

Source: torch 2.13, c10/cuda/CUDACachingAllocator.cpp, Note [Expandable Segments],
find_expandable_block, map_block, unmap_block. Pages are 2 MiB in the small pool and
`large_segment_bytes` (20 MiB) in the large one; reserved bytes are the pages that are mapped. The
range is 1 1/8 of the device's memory, so that pages that were unmapped low can be mapped high.
"""

from __future__ import annotations

from typing import Protocol

from planner.allocator.blocks import Block, FreeBlocks
from planner.allocator.settings import SMALL_SEGMENT_BYTES, AllocatorSettings

ENDLESS_BYTES = 2**50
"""The range of addresses where the device has no capacity."""


class Device(Protocol):
    """What pages are taken from and given back to."""

    settings: AllocatorSettings
    capacity_bytes: int | None

    def addresses(self, size: int) -> int:
        """Where a range of so many bytes begins."""

    def reserve(self, size: int) -> bool:
        """Take bytes of the device; False if it has not got them."""

    def give_back(self, size: int) -> None:
        """Return bytes to the device."""


class ExpandableSegments:
    """The expandable segments of one device."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def best(self, pool: FreeBlocks, index: int) -> int:
        """A block counts with what it can grow by: prefer a larger one that cannot grow.

        Walks up from the smallest block that fits while the next one can become less large.
        """
        keys, blocks = pool.keys, pool.blocks
        size = _growable(blocks[keys[index]])
        while index + 1 < len(keys):
            following = _growable(blocks[keys[index + 1]])
            if following >= size:
                break
            index, size = index + 1, following
        return index

    def take(self, pool: FreeBlocks, size: int) -> Block | None:
        """Map pages until a block of `size` bytes is there; None: the device has no room."""
        block = self._lowest(pool, size)
        if not block.mapped and not self._map(block, min(block.size, size)):
            return None
        while block.size < size:
            unmapped = block.next
            assert unmapped is not None
            if not self._map(unmapped, min(size - block.size, unmapped.size)):
                return None
            block = unmapped
        pool.remove(block)
        return block

    def release(self, block: Block) -> None:
        """Unmap the whole pages within a free block."""
        page = self._page(block.pool)
        start = block.segment + -(-(block.address - block.segment) // page) * page
        end = block.segment + (block.address + block.size - block.segment) // page * page
        if start >= end:
            return
        pool = block.pool
        pool.remove(block)
        if start > block.address:
            unmapped = block.split(start - block.address)
            pool.add(block)
            block = unmapped
        if end < block.address + block.size:
            pool.add(block.split(end - block.address))
        block.mapped = False
        self._device.give_back(block.size)
        self._merge(block)
        if block.is_split:  # else nothing of the range is left
            pool.unmapped[block.address] = block

    def _lowest(self, pool: FreeBlocks, size: int) -> Block:
        """The lowest address from which free and unmapped neighbours have room for `size`."""
        for address in sorted(pool.unmapped):
            block = pool.unmapped[address]
            if block.previous is not None and not block.previous.busy:
                block = block.previous
            room, there = 0, block
            while True:
                room += there.size
                if room >= size:
                    return block
                if there.next is None or there.next.busy:
                    break
                there = there.next
        return self._new_range(pool)

    def _new_range(self, pool: FreeBlocks) -> Block:
        capacity = self._device.capacity_bytes
        wanted = ENDLESS_BYTES if capacity is None else capacity + capacity // 8
        page = self._page(pool)
        size = -(-wanted // page) * page
        address = self._device.addresses(size)
        block = Block(address, size, pool, address)
        block.mapped = False
        pool.unmapped[address] = block
        return block

    def _map(self, block: Block, size: int) -> bool:
        """Map the first pages of an unmapped block, enough for `size`, and make it free.

        An unmapped block begins at a page. All pages or none: those that cuMemCreate did give are
        released when it fails.
        """
        pool, page = block.pool, self._page(block.pool)
        mapped = -(-size // page) * page
        if not self._device.reserve(mapped):
            return False
        del pool.unmapped[block.address]
        block.mapped = True
        if mapped < block.size:
            rest = block.split(mapped)
            rest.mapped = False
            pool.unmapped[rest.address] = rest
        self._merge(block)
        pool.add(block)
        return True

    def _merge(self, block: Block) -> None:
        """Join a block with neighbours that are idle and mapped, or not, as it is."""
        before, behind = block.previous, block.next
        if before is not None and not before.busy and before.mapped == block.mapped:
            _forget(before)
            block.absorb_previous()
        if behind is not None and not behind.busy and behind.mapped == block.mapped:
            _forget(behind)
            block.absorb_next()

    def _page(self, pool: FreeBlocks) -> int:
        return SMALL_SEGMENT_BYTES if pool.is_small else self._device.settings.large_segment_bytes


def _growable(block: Block) -> int:
    """What a free block can become: its size and the unmapped addresses behind it."""
    behind = block.next
    return block.size + (behind.size if behind is not None and not behind.mapped else 0)


def _forget(block: Block) -> None:
    if block.mapped:
        block.pool.remove(block)
    else:
        del block.pool.unmapped[block.address]
