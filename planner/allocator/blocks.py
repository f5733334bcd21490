"""Blocks, and the free ones of a pool in the order in which they are searched."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

ADDRESS_BITS = 64


class Block:
    """A piece of a segment: free, or serving one storage.

    `previous` and `next` are its neighbours in the segment. `busy` is true from malloc until the
    block can be used again; `mapped` is false for addresses of an expandable segment without pages.
    `born` is the pool's search count when it was last freed (garbage collection goes by age).
    """

    __slots__ = (
        "address",
        "born",
        "busy",
        "mapped",
        "next",
        "pool",
        "previous",
        "requested_bytes",
        "segment",
        "size",
        "streams",
    )

    def __init__(self, address: int, size: int, pool: FreeBlocks, segment: int) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.segment = segment  # its first address
        self.requested_bytes = 0
        self.busy = False
        self.mapped = True
        self.born = 0
        self.previous: Block | None = None
        self.next: Block | None = None
        self.streams: set[int] | None = None

    @property
    def is_split(self) -> bool:
        """Whether the segment has other blocks."""
        return self.previous is not None or self.next is not None

    def split(self, size: int) -> Block:
        """Keep the first `size` bytes; the rest becomes the next block, which is returned."""
        rest = Block(self.address + size, self.size - size, self.pool, self.segment)
        rest.mapped = self.mapped
        rest.previous = self
        rest.next = self.next
        if rest.next is not None:
            rest.next.previous = rest
        self.next = rest
        self.size = size
        return rest

    def absorb_previous(self) -> None:
        """Take over the block before this one."""
        gone = self.previous
        assert gone is not None
        self.address = gone.address
        self.size += gone.size
        self.previous = gone.previous
        if self.previous is not None:
            self.previous.next = self

    def absorb_next(self) -> None:
        """Take over the block behind this one."""
        gone = self.next
        assert gone is not None
        self.size += gone.size
        self.next = gone.next
        if self.next is not None:
            self.next.previous = self


class FreeBlocks:
    """The free blocks of one pool on one stream, ordered by (size, address).

    One int is the key of both, so that a search is one bisection of a plain list.
    """

    __slots__ = ("blocks", "is_small", "keys", "owner", "searches", "stream", "unmapped")

    def __init__(self, owner: Hashable | None, stream: int, *, is_small: bool) -> None:
        self.owner = owner  # a private pool; None: shared
        self.stream = stream
        self.is_small = is_small
        self.keys: list[int] = []
        self.blocks: dict[int, Block] = {}
        self.unmapped: dict[int, Block] = {}  # by address, expandable segments only
        self.searches = 0

    def add(self, block: Block) -> None:
        """A block becomes free."""
        key = block.size << ADDRESS_BITS | block.address
        insort(self.keys, key)
        self.blocks[key] = block
        block.born = self.searches

    def remove(self, block: Block) -> None:
        """A free block is merged, mapped or released."""
        key = block.size << ADDRESS_BITS | block.address
        del self.keys[bisect_left(self.keys, key)]
        del self.blocks[key]

    def take(self, index: int) -> Block:
        """The block at a position of the order, no longer free."""
        return self.blocks.pop(self.keys.pop(index))

    def position(self, size: int) -> int:
        """Where the smallest block of at least `size` bytes stands; len(keys) if there is none."""
        return bisect_left(self.keys, size << ADDRESS_BITS)

    @property
    def largest_bytes(self) -> int:
        """The largest free block; 0 without any."""
        return self.keys[-1] >> ADDRESS_BITS if self.keys else 0
