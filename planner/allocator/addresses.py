"""Which addresses cudaMalloc returns: they decide between free blocks of one size.

The driver does not say. What 16 histories of an H200's allocator show (profiles/data/histories,
driver 580): address space is taken in multiples of 32 MiB, each below the one before; an allocation
lies at the beginning of its range, and what is left behind it serves later ones that fit. Above all
of them the context has 8 MiB of a range, whose other 24 the first segment gets that fits: at the
same address in 11 of 13 processes. Segments
laid out so reserve to the byte what was reserved in all 16, at rising addresses in 8. Ranges
given back are not used again: an allocator asks for more only where nothing it has fits.

Where two blocks of one size are free, this decides, and drivers may differ: qwen1.5-moe's prefill
of 2 × 2 048 tokens reserves 30.11 to 30.28 GB when its segments are put anywhere.
"""

from __future__ import annotations

RANGE_BYTES = 32 * 2**20
CONTEXT_BYTES = 8 * 2**20
TOP = 1 << 47


class AddressSpace:
    """The addresses of one device, from the top downwards."""

    def __init__(self) -> None:
        self._low = TOP - RANGE_BYTES
        rest_size = RANGE_BYTES - CONTEXT_BYTES
        self._left = [(rest_size, TOP - rest_size)]  # (size, address) of what is left in ranges

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
