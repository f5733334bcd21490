"""The caching allocator written the slow, obvious way: intervals in segments, nothing kept sorted.

A free block is not an object here but a gap: what is mapped and not live. Every step looks at
everything. Shared with the real one: nothing but the constants.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

MIB = 2**20


class FullError(Exception):
    """The device has no room, even after everything free was returned."""


@dataclass
class Segment:
    """Addresses [start, start + size); `pages` of them are mapped, `live` are owner → interval."""

    start: int
    size: int
    small: bool
    stream: int
    page: int
    pages: set[int] = field(default_factory=set)
    live: dict[object, tuple[int, int]] = field(default_factory=dict)

    def gaps(self) -> list[tuple[int, int]]:
        """Maximal intervals that are mapped and not live."""
        found: list[tuple[int, int]] = []
        edges = {self.start + (p + side) * self.page for p in self.pages for side in (0, 1)}
        edges |= {edge for interval in self.live.values() for edge in interval}
        points = sorted(edges)
        for low, high in pairwise(points):
            mapped = (low - self.start) // self.page in self.pages
            taken = any(a <= low < b for a, b in self.live.values())
            if mapped and not taken:
                if found and found[-1][1] == low:
                    low = found.pop()[0]
                found.append((low, high))
        return found

    def unmapped(self, address: int) -> int:
        """Bytes of unmapped pages from an address on."""
        page = (address - self.start) // self.page
        count = 0
        while page + count < self.size // self.page and page + count not in self.pages:
            count += 1
        return count * self.page

    @property
    def mapped_bytes(self) -> int:
        return len(self.pages) * self.page


class Reference:
    """malloc, free and empty_cache; addresses rise as in the real one."""

    def __init__(self, *, expandable: bool, capacity: int) -> None:
        self.expandable = expandable
        self.capacity = capacity
        self.segments: list[Segment] = []
        self.top = 1 << 40

    @property
    def reserved(self) -> int:
        return sum(s.mapped_bytes for s in self.segments)

    @property
    def allocated(self) -> int:
        return sum(b - a for s in self.segments for a, b in s.live.values())

    def malloc(self, owner: object, requested: int, stream: int = 0) -> tuple[int, int]:
        """(address, size) of the block."""
        size = max(1, -(-requested // 512)) * 512
        small = size <= MIB
        mine = [s for s in self.segments if (s.small, s.stream) == (small, stream)]
        fitting = sorted((b - a, a, s.start) for s in mine for a, b in s.gaps() if b - a >= size)
        if fitting:
            gap, address, start = fitting[self._preferred(fitting) if self.expandable else 0]
            segment = next(s for s in mine if s.start == start)
        else:
            segment, address, gap = self._grow(small, stream, size)
        at_least = 512 if small or self.expandable else MIB + 1
        owned = size if gap - size >= at_least else gap
        segment.live[owner] = (address, address + owned)
        return address, owned

    def free(self, owner: object) -> None:
        for segment in self.segments:
            segment.live.pop(owner, None)

    def empty_cache(self) -> None:
        for segment in list(self.segments):
            if not segment.pages:
                continue  # addresses of which no page could be mapped: torch keeps the range
            if self.expandable:
                for page in list(segment.pages):
                    low = segment.start + page * segment.page
                    inside = [(a, b) for a, b in segment.live.values() if b > low]
                    if not any(a < low + segment.page for a, _ in inside):
                        segment.pages.remove(page)
            if not segment.live and (not self.expandable or not segment.pages):
                self.segments.remove(segment)

    def _preferred(self, fitting: list[tuple[int, int, int]]) -> int:
        """Walk to the next larger gap while it can grow to less."""

        def growable(entry: tuple[int, int, int]) -> int:
            size, address, start = entry
            segment = next(s for s in self.segments if s.start == start)
            return size + segment.unmapped(address + size)

        chosen = 0
        while chosen + 1 < len(fitting) and growable(fitting[chosen + 1]) < growable(
            fitting[chosen]
        ):
            chosen += 1
        return chosen

    def _grow(self, small: bool, stream: int, size: int) -> tuple[Segment, int, int]:
        grow = self._grow_range if self.expandable else self._new_segment
        got = grow(small, stream, size)
        if got is None:
            self.empty_cache()
            got = grow(small, stream, size)
        if got is None:
            raise FullError
        return got

    def _new_segment(self, small: bool, stream: int, size: int) -> tuple[Segment, int, int] | None:
        wanted = -(-size // (2 * MIB)) * 2 * MIB
        if size < 10 * MIB:
            wanted = 2 * MIB if small else 20 * MIB
        if self.reserved + wanted > self.capacity:
            return None
        segment = Segment(self.top, wanted, small, stream, page=wanted, pages={0})
        self.top += wanted
        self.segments.append(segment)
        return segment, segment.start, wanted

    def _grow_range(self, small: bool, stream: int, size: int) -> tuple[Segment, int, int] | None:
        page = 2 * MIB if small else 20 * MIB
        for segment in self.segments:
            if (segment.small, segment.stream) != (small, stream):
                continue
            # every place at which something unmapped begins, or the gap that ends there
            for number in range(segment.size // page):
                begins = number == 0 or number - 1 in segment.pages
                address = segment.start + number * page
                occupied = any(a < address < b for a, b in segment.live.values())
                if number in segment.pages or not (begins or occupied):
                    continue
                before = [a for a, b in segment.gaps() if b == address]
                address = before[0] if before else address
                ends = [a for a, _ in segment.live.values() if a >= address]
                if min(ends, default=segment.start + segment.size) - address >= size:
                    return self._map(segment, address, size)
        pages = -(-(self.capacity + self.capacity // 8) // page)
        segment = Segment(self.top, pages * page, small, stream, page)
        self.top += pages * page
        self.segments.append(segment)
        return self._map(segment, segment.start, size)

    def _map(self, segment: Segment, address: int, size: int) -> tuple[Segment, int, int] | None:
        """Map what is missing of [address, address + size), a run of pages at a time."""
        first = (address - segment.start) // segment.page
        last = (address + size - 1 - segment.start) // segment.page
        missing = [p for p in range(first, last + 1) if p not in segment.pages]
        while missing:
            run = [p for i, p in enumerate(missing) if p == missing[0] + i]
            if self.reserved + len(run) * segment.page > self.capacity:
                return None
            segment.pages |= set(run)
            missing = missing[len(run) :]
        gap = next((a, b) for a, b in segment.gaps() if a <= address < b)
        return segment, address, gap[1] - address


def rising():
    """Segments one above the other, as the reference has them."""
    top = 1 << 40

    def place(size):
        nonlocal top
        start, top = top, top + size
        return start

    return place
