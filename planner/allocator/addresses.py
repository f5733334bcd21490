"""Which addresses cudaMalloc returns: they decide between free blocks of one size.

The driver does not say. What 16 histories of an H200's allocator show (profiles/data/histories,
driver 580): address space is taken in multiples of 32 MiB, each below the one before; an allocation
lies at the beginning of its range, and what is left behind it serves later ones that fit. Segments
laid out so reserve to the byte what was reserved in 15 of the 16, at rising addresses in 8. Ranges
given back are not used again: an allocator asks for more only where nothing it has fits.
"""

from __future__ import annotations

RANGE_BYTES = 32 * 2**20
TOP = 1 << 47


class AddressSpace:
    """The addresses of one device, from the top downwards."""

    def __init__(self) -> None:
        self._low = TOP
        self._left: list[tuple[int, int]] = []  # (size, address) of what is left in ranges

    def take(self, size: int) -> int:
        """Where an allocation of so many bytes lies: the smallest rest that fits, else below."""
        fitting = [rest for rest in self._left if rest[0] >= size]
        if fitting:
            rest_size, address = min(fitting)
            self._left.remove((rest_size, address))
        else:
            rest_size = -(-size // RANGE_BYTES) * RANGE_BYTES
            self._low -= rest_size
            address = self._low
        if rest_size > size:
            self._left.append((rest_size - size, address + size))
        return address
