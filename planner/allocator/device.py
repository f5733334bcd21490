"""One device's caching allocator: where a block comes from and what becomes of it.

The rules are those of torch 2.13, c10/cuda/CUDACachingAllocator.cpp (malloc, get_free_block,
alloc_block, should_split, free_block, release_cached_blocks), in its order:

1. round the request to 512 bytes; at most 1 MiB comes from the small pool, more from the large one;
2. the smallest free block that is large enough, the lowest address among equals;
3. none: a new segment, 2 MiB (small), 20 MiB (below 10 MiB) or the size up to a multiple of 2 MiB;
4. split off the rest: in the small pool from 512 bytes on (in both with expandable segments), in
   the large one when *more* than 1 MiB is left: 33.7 MiB in a segment of 34 MiB own all of it;
5. no room: return every segment without a live block to the device and try once more.

Where segments lie is the driver's business and matters only between free blocks of one size: see
addresses.py. Thread safety, peer access and IPC are left out, as
are callbacks that free memory, `use_on_oom` pools, and a table of `roundup_power2_divisions` by
size (one number for all sizes is known).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

from planner.allocator.addresses import AddressSpace
from planner.allocator.blocks import Block, FreeBlocks
from planner.allocator.expandable import ExpandableSegments
from planner.allocator.results import OutOfMemory, OutOfMemoryError, Usage
from planner.allocator.settings import (
    DEFAULTS,
    MIN_BLOCK_BYTES,
    SMALL_BYTES,
    AllocatorSettings,
    rounded,
    segment_bytes,
)
from planner.errors import ConfigError, shown


class DeviceAllocator:
    """The state of the allocator on one device, and its counters.

    `capacity_bytes` is what the device can give in all (its memory less the CUDA context and what
    others hold); None: no end. `place` gives the address of a new segment of so many bytes; None:
    as addresses.py has it.
    """

    def __init__(
        self,
        settings: AllocatorSettings = DEFAULTS,
        *,
        capacity_bytes: int | None = None,
        place: Callable[[int], int] | None = None,
    ) -> None:
        self.settings = settings
        self.capacity_bytes = capacity_bytes
        self.allocated_bytes = self.requested_bytes = self.reserved_bytes = 0
        self.peak_allocated_bytes = self.peak_requested_bytes = self.peak_reserved_bytes = 0
        self.segments = {True: 0, False: 0}  # by is_small
        self.device_allocs = self.device_frees = self.retries = 0
        self.at_peak = self.usage()
        self._place = place or AddressSpace().take
        self._top = 1 << 40  # the next range of an expandable segment
        self._pools: dict[Hashable | None, dict[int, tuple[FreeBlocks, FreeBlocks]]] = {None: {}}
        self._shared = self._pools[None]
        self._current = self._shared
        self._capturing: Hashable | None = None
        self._released: set[Hashable] = set()
        self._waiting: list[Block] = []
        self._expandable = ExpandableSegments(self) if settings.expandable_segments else None
        self._divisions = settings.roundup_power2_divisions
        self._max_split = settings.max_split_bytes
        self._collects = bool(settings.garbage_collection_threshold and capacity_bytes)

    def usage(self) -> Usage:
        """What is held now."""
        return Usage(
            allocated_bytes=self.allocated_bytes,
            requested_bytes=self.requested_bytes,
            reserved_bytes=self.reserved_bytes,
            small_segments=self.segments[True],
            large_segments=self.segments[False],
        )

    def reset_peaks(self) -> None:
        """Count peaks from here on, as torch.cuda.reset_peak_memory_stats does."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_requested_bytes = self.requested_bytes
        self.peak_reserved_bytes = self.reserved_bytes

    def malloc(self, requested_bytes: int, stream: int = 0) -> Block:
        """A block for a request; raises OutOfMemoryError where torch does."""
        if self._divisions or requested_bytes < MIN_BLOCK_BYTES:
            if requested_bytes < 0:
                raise ConfigError(f"size_bytes={shown(requested_bytes)} is not allowed: at least 0")
            size = rounded(requested_bytes, self._divisions)
        else:
            size = (requested_bytes + 511) & -512
        lists = self._current.get(stream) or self._lists(stream)
        pool = lists[0] if size <= SMALL_BYTES else lists[1]
        block = self._cached(pool, size)
        grown = block is None
        if block is None:
            block = self._new(pool, size, requested_bytes)
        rest = block.size - size
        if rest and self._splits(pool, size, rest):
            pool.add(block.split(size))
        block.busy = True
        block.requested_bytes = requested_bytes
        allocated = self.allocated_bytes = self.allocated_bytes + block.size
        if allocated > self.peak_allocated_bytes:
            self.peak_allocated_bytes = allocated
        requested = self.requested_bytes = self.requested_bytes + requested_bytes
        if requested > self.peak_requested_bytes:
            self.peak_requested_bytes = requested
        if grown and self.reserved_bytes > self.at_peak.reserved_bytes:
            self.at_peak = self.usage()
        return block

    def free(self, block: Block) -> None:
        """The storage of a block is gone; other streams that used it keep it for a while."""
        self.allocated_bytes -= block.size
        if block.streams:
            self._waiting.append(block)
        else:
            self._free_now(block)

    def record_stream(self, block: Block, stream: int) -> None:
        """Another stream uses the block; its own stream needs no waiting."""
        if stream != block.pool.stream:
            block.streams = (block.streams or set()) | {stream}

    def synchronize(self) -> None:
        """Every stream has caught up: freed blocks that waited for one are free."""
        waiting, self._waiting = self._waiting, []
        for block in waiting:
            block.streams = None
            self._free_now(block)

    def empty_cache(self) -> None:
        """Return every segment without a live block, of shared pools and of released ones."""
        self.synchronize()
        for owner in (None, *self._released):
            for lists in self._pools[owner].values():
                for pool in lists:
                    self._release_all(pool)

    def begin_pool(self, owner: Hashable) -> None:
        """A private pool serves all allocations from here on."""
        if self._capturing is not None:
            raise ConfigError(f"pool={shown(owner)} begins inside pool={shown(self._capturing)}")
        self._capturing = owner
        self._current = self._pools.setdefault(owner, {})

    def end_pool(self) -> None:
        """The shared pools serve again."""
        if self._capturing is None:
            raise ConfigError("a private pool ends that did not begin")
        self._capturing = None
        self._current = self._shared

    def release_pool(self, owner: Hashable) -> None:
        """empty_cache and retries may return the private pool's segments from here on."""
        if owner is None or owner not in self._pools:
            raise ConfigError(f"pool={shown(owner)} is not a private pool of this allocator")
        self._released.add(owner)

    def pools(self) -> Iterator[FreeBlocks]:
        """The free blocks of every pool and stream."""
        for lists in self._pools.values():
            for pair in lists.values():
                yield from pair

    def free_blocks(self) -> Iterator[Block]:
        """Every free block; with those of live storages they are all that is reserved."""
        for pool in self.pools():
            yield from pool.blocks.values()

    # --- what a new block needs -----------------------------------------------------------------

    def _lists(self, stream: int) -> tuple[FreeBlocks, FreeBlocks]:
        owner = self._capturing
        made = FreeBlocks(owner, stream, is_small=True), FreeBlocks(owner, stream, is_small=False)
        self._current[stream] = made
        return made

    def _cached(self, pool: FreeBlocks, size: int) -> Block | None:
        """The best free block, or None (get_free_block)."""
        if self._collects:
            pool.searches += 1
        index = pool.position(size)
        if index == len(pool.keys):
            return None
        if self._expandable is not None:
            index = self._expandable.best(pool, index)
        if self._max_split is not None:
            found = pool.blocks[pool.keys[index]].size
            limit = self.settings.max_non_split_rounding_bytes
            if size < self._max_split <= found:
                return None  # an oversize block is kept for large requests
            if size >= self._max_split and found >= size + limit:
                return None
        return pool.take(index)

    def _splits(self, pool: FreeBlocks, size: int, rest: int) -> bool:
        """Whether the rest of a block is split off (should_split); rests are multiples of 512."""
        if pool.is_small or self._expandable is not None:
            return rest >= MIN_BLOCK_BYTES
        return rest > SMALL_BYTES and (self._max_split is None or size < self._max_split)

    def _new(self, pool: FreeBlocks, size: int, requested_bytes: int) -> Block:
        """Memory from the device, after freeing cached segments if need be."""
        if self._collects:
            self._collect()
        block = self._from_device(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._from_device(pool, size)
        if block is None and self._capturing is None:
            self.empty_cache()
            self.retries += 1
            block = self._from_device(pool, size)
        if block is None:
            raise OutOfMemoryError(self._oom(pool, size, requested_bytes))
        return block

    def _from_device(self, pool: FreeBlocks, size: int) -> Block | None:
        """A new segment, or pages of an expandable one; None: the device has no room."""
        if self._expandable is not None:
            return self._expandable.take(pool, size)
        wanted = segment_bytes(size, self.settings.large_segment_bytes)
        if not self.reserve(wanted):
            return None
        self.segments[pool.is_small] += 1
        address = self._place(wanted)
        return Block(address, wanted, pool, address)

    def reserve(self, size: int) -> bool:
        """Take bytes of the device; False if it has not got them."""
        reserved = self.reserved_bytes + size
        if self.capacity_bytes is not None and reserved > self.capacity_bytes:
            return False
        self.reserved_bytes = reserved
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, reserved)
        self.device_allocs += 1
        return True

    def give_back(self, size: int) -> None:
        """Return bytes to the device."""
        self.reserved_bytes -= size
        self.device_frees += 1

    def addresses(self, size: int) -> int:
        """A range for an expandable segment, above all that were given before."""
        start, self._top = self._top, self._top + size
        return start

    def _oom(self, pool: FreeBlocks, size: int, requested_bytes: int) -> OutOfMemory:
        assert self.capacity_bytes is not None
        return OutOfMemory(
            id=None,
            event=-1,
            requested_bytes=requested_bytes,
            tried_bytes=segment_bytes(size, self.settings.large_segment_bytes),
            capacity_bytes=self.capacity_bytes,
            free_bytes=self.capacity_bytes - self.reserved_bytes,
            allocated_bytes=self.allocated_bytes,
            reserved_bytes=self.reserved_bytes,
            largest_cached_bytes=pool.largest_bytes,
        )

    # --- what becomes of a freed one ------------------------------------------------------------

    def _free_now(self, block: Block) -> None:
        """Merge a block with free neighbours and put it among the free ones (free_block)."""
        self.requested_bytes -= block.requested_bytes
        block.busy = False
        pool = block.pool
        neighbour = block.previous
        if neighbour is not None and not neighbour.busy and neighbour.mapped:
            pool.remove(neighbour)
            block.absorb_previous()
        neighbour = block.next
        if neighbour is not None and not neighbour.busy and neighbour.mapped:
            pool.remove(neighbour)
            block.absorb_next()
        pool.add(block)

    def _release_all(self, pool: FreeBlocks) -> None:
        """Return every whole free segment, or every free page (release_blocks)."""
        for block in list(pool.blocks.values()):
            if self._expandable is not None:
                self._expandable.release(block)
            elif not block.is_split:
                self._release(block)

    def _release(self, block: Block) -> None:
        block.pool.remove(block)
        self.segments[block.pool.is_small] -= 1
        self.give_back(block.size)

    def _release_oversize(self, pool: FreeBlocks, size: int) -> bool:
        """With a max_split_size: return just enough oversize blocks of this pool.

        release_available_cached_blocks: one block that is large enough, else the largest ones until
        their sum is.
        """
        if self._max_split is None or self._expandable is not None:
            return False
        wanted = max(size, self._max_split)
        index = pool.position(wanted)
        if index < len(pool.keys):
            self._release(pool.blocks[pool.keys[index]])
            return True
        released = 0
        while released < wanted and pool.largest_bytes >= self._max_split:
            block = pool.blocks[pool.keys[-1]]
            released += block.size
            self._release(block)
        return released >= wanted

    def _collect(self) -> None:
        """Return the segments that were not used for longest (garbage_collect_cached_blocks).

        Only shared large pools; whole free segments older than the average of them, again and again
        until reserved bytes are below the threshold. In torch it needs a memory fraction to be set.
        """
        assert self.capacity_bytes is not None
        limit = int(self.settings.garbage_collection_threshold * self.capacity_bytes)
        target = self.reserved_bytes - limit
        free = [
            block
            for _, large in self._shared.values()
            for block in large.blocks.values()
            if not block.is_split
        ]
        reclaimed = 0
        while target > reclaimed and free:
            ages = {block: block.pool.searches - block.born for block in free}
            mean = sum(ages.values()) / len(free)
            for block in [block for block in free if ages[block] >= mean]:
                reclaimed += block.size
                free.remove(block)
                self._release(block)
