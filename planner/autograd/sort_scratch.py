"""What CUDA's kernels that sort allocate besides results: torch.sort, an embedding's gradient.

ATen/native/cuda/Sort.cpp, Sort.cu and Embedding.cu of torch 2.11; keys and their places are int64.
The temporary storage of cub's radix sort is device/dispatch/dispatch_radix_sort.cuh's of CUDA 13,
one sweep over eight digits. Checked against histories of an H200's allocator
(profiles/data/histories).
"""

from __future__ import annotations

from planner.program import Dims, Number, Shape, Symbol, evaluate, formula, minimum

FLOAT32 = INT32 = 4
INT64 = 8
IN_PLACE_ELEMENTS = 4096
"""Sorted by one block, in place (should_use_small_sort)."""
SWEEP_TILE, DIGITS, DIGIT_VALUES = 4096, 8, 256
"""Elements of a block of the sweep: as few as leave one block to the 4 096 of a history."""
ALIGNMENT = 256
"""Of each part of cub's temporary storage, and of all of it in what torch hands over."""
ATOMIC_EMBEDDING_IDS, ROWS_A_SEGMENT = 3072, 10
"""Ids up to which no sorting is done; rows that one warp adds up (NROWS_PER_THREAD)."""


def radix_sort_bytes(count: Number) -> Number:
    """A second buffer of keys and of values, where digits begin, what tiles count, how many do."""
    begins = DIGITS * DIGIT_VALUES * INT64
    tiles = -(-count // SWEEP_TILE)
    second = -(-INT64 * count // ALIGNMENT) * ALIGNMENT
    counters = ALIGNMENT
    return 2 * second + begins + tiles * DIGIT_VALUES * INT32 + counters + ALIGNMENT - 1


def sort_scratch(count: Shape) -> list[tuple[Shape, int]]:
    """(shape, itemsize) of torch.sort's: the places to begin with, then the radix sort's."""

    def radix(d: Dims) -> Number:
        n = evaluate(count, d)
        return radix_sort_bytes(n) * (n > IN_PLACE_ELEMENTS)

    return [(count, INT64), ((Symbol(f"radix sort({formula(count)})", radix),), 1)]


def embedding_scratch(ids: Shape, rows: int, width: int) -> list[tuple[Shape, int]]:
    """Of the gradient [rows, width] of a table: more than 3 072 ids are sorted, and those that are
    equal summed up in float32, ten at a time: n ids are at most n // 10 + min(n, rows) sums.
    """
    called = f"{formula(ids)} ids"

    def sorted_ids(d: Dims) -> Number:
        n = evaluate(ids, d)
        return n * (n > ATOMIC_EMBEDDING_IDS)

    def segments(d: Dims) -> Number:
        return minimum(sorted_ids(d), rows)

    def sums(d: Dims) -> Number:
        return sorted_ids(d) // ROWS_A_SEGMENT + segments(d)

    n = Symbol(f"(sorted {called})", sorted_ids)
    distinct = Symbol(f"(distinct of {called}, {rows} at most)", segments)
    summed = Symbol(f"(sums of {called} of {rows})", sums)
    return [
        *[((n,), INT64)] * 3,  # sorted, their places, where each segment begins
        *[((distinct,), INT64)] * 2,
        ((summed,), INT64),
        ((summed, width), FLOAT32),
    ]
