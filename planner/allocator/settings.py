"""What PYTORCH_ALLOC_CONF sets, and the allocator's constants.

Source: torch 2.13, c10/core/AllocatorConfig.h.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import ConfigError, check_size

MIN_BLOCK_BYTES = 512
"""Blocks are multiples of this (kMinBlockSize)."""

SMALL_BYTES = 2**20
"""Rounded requests up to this size come from the small pool (kSmallSize)."""

SMALL_SEGMENT_BYTES = 2 * 2**20
"""A segment of the small pool (kSmallBuffer)."""

MIN_LARGE_BYTES = 10 * 2**20
"""Requests below this size share segments of `large_segment_bytes` (kMinLargeAlloc)."""

ROUND_LARGE_BYTES = 2 * 2**20
"""Larger ones get a segment of their own, rounded up to this (kRoundLarge)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorSettings:
    """The options of PYTORCH_ALLOC_CONF that change where a block comes from; torch's defaults.

    `max_split_bytes`: blocks of at least this size are never split; None: no such limit.
    `roundup_power2_divisions`: sizes are rounded up to one of so many steps between two powers of
    two; 0: to 512 bytes. `garbage_collection_threshold`: the share of the capacity above which old
    cached segments are returned; 0: never.
    """

    expandable_segments: bool = False
    large_segment_bytes: int = 20 * 2**20
    max_split_bytes: int | None = None
    max_non_split_rounding_bytes: int = 20 * 2**20
    roundup_power2_divisions: int = 0
    garbage_collection_threshold: float = 0.0

    def __post_init__(self) -> None:
        check_size("large_segment_bytes", self.large_segment_bytes, minimum=MIN_LARGE_BYTES)
        if self.large_segment_bytes % ROUND_LARGE_BYTES:
            raise ConfigError(
                f"large_segment_bytes={self.large_segment_bytes} is not allowed: "
                f"a multiple of {ROUND_LARGE_BYTES}"
            )
        if self.max_split_bytes is not None:
            check_size(
                "max_split_bytes",
                self.max_split_bytes,
                minimum=self.large_segment_bytes + 1,
                maximum=2**60,
            )
        check_size("max_non_split_rounding_bytes", self.max_non_split_rounding_bytes, minimum=0)
        divisions = check_size(
            "roundup_power2_divisions", self.roundup_power2_divisions, minimum=0, maximum=2**20
        )
        if divisions & (divisions - 1):
            raise ConfigError(
                f"roundup_power2_divisions={divisions} is not allowed: 0 or a power of two"
            )
        if not 0.0 <= self.garbage_collection_threshold < 1.0:
            raise ConfigError(
                f"garbage_collection_threshold={self.garbage_collection_threshold!r} is not "
                "allowed: from 0 to below 1"
            )


DEFAULTS = AllocatorSettings()


def rounded(requested_bytes: int, divisions: int = 0) -> int:
    """The size of the block that serves a request.

    Multiples of 512 bytes, at least one of them; with `divisions` the next of so many equal steps
    between two powers of two, for requests above 512 · divisions bytes.
    """
    if requested_bytes < MIN_BLOCK_BYTES:
        return MIN_BLOCK_BYTES
    if divisions > 1 and requested_bytes > MIN_BLOCK_BYTES * divisions:
        floor = 1 << (requested_bytes.bit_length() - 1)
        step = floor // divisions
        return -(-requested_bytes // step) * step
    return -(-requested_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def segment_bytes(block_bytes: int, large_segment_bytes: int) -> int:
    """What is asked of cudaMalloc for a block that no cached one can serve."""
    if block_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < MIN_LARGE_BYTES:
        return large_segment_bytes
    return -(-block_bytes // ROUND_LARGE_BYTES) * ROUND_LARGE_BYTES
