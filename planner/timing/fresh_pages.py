"""Memory that a pass on a CPU is given anew: the system clears a page when it is first written to.

torch takes a CPU's tensors from malloc, which keeps what is freed only up to a point (glibc's
malloc/malloc.c: sysmalloc, systrim, do_set_mallopt). A tensor of more than 32 MiB
(DEFAULT_MMAP_THRESHOLD_MAX) is mapped for itself, and unmapped with it. Smaller ones lie in a heap
whose end goes back to the system once 2·L bytes there are free, L the largest that was ever mapped
and freed, 128 KiB at the least: what a pass makes first.

    fresh = Σ mapped + Σ max(0, live − touched)        touched := max(touched, live) at every op,
                                                       live where touched − live ≥ 2·L

The heap is taken to fill from its start, without holes. `touched` at the start of a pass is what
the one before has left. Page faults that Linux counts (`python benchmarks/page_faults.py`; glibc
2.36, torch 2.13) are between next to none and 0.8 of what this gives: malloc keeps more where
something larger was freed before the passes, which a program does not know of. In decode steps
there are next to none, and none are given.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import chain

import numpy as np

from planner.program import Buffer, Dims, Number, Program, maximum
from planner.timing.calibration import Calibration
from planner.timing.op_kinds import is_there

MAPPED_FROM_BYTES = 32 * 2**20
SMALLEST_BYTES = 128 * 2**10
PAGES_ERROR = 1.0
"""How far `fresh_bytes` may be from what is counted: a process may need none."""


def given_seconds(program: Program, dims: Dims, calibration: Calibration) -> Number:
    """Time that goes into it; 0 where a page was not timed, as on GPUs."""
    pages = calibration.pages
    if pages is None:
        return 0.0
    return fresh_bytes(program, dims) * (pages.page_s / pages.page_bytes)


def fresh_bytes(program: Program, dims: Dims) -> Number:
    """Bytes that one of several equal passes is given anew, over every cell of `dims`."""
    steps, made = _steps(program)
    sizes: dict[Buffer, Number] = {}
    mapped: Number = 0
    largest: Number = SMALLEST_BYTES
    for buffer, times in made.items():
        size = buffer.nbytes(dims)
        apart = (size > MAPPED_FROM_BYTES) * 1
        mapped = mapped + times * apart * size
        sizes[buffer] = (1 - apart) * size
        largest = maximum(largest, sizes[buffer] if times else 0)
    play = _play_point if dims.is_point else _play
    touched, _ = play(steps, sizes, 0, 2 * largest)
    _, given = play(steps, sizes, touched, 2 * largest)  # a pass finds what one before it has left
    return mapped + given


Steps = list[tuple[bool, Buffer]]


def _play(
    steps: Steps, sizes: dict[Buffer, Number], touched: Number, kept: Number
) -> tuple[Number, Number]:
    """What is touched after a pass, and what was given in it."""
    live: Number = 0.0
    given: Number = 0.0
    for made, buffer in steps:
        if made:
            live = live + sizes[buffer]
            given = given + np.maximum(live - touched, 0.0)
            touched = np.maximum(touched, live)
        else:
            live = live - sizes[buffer]
            touched = np.where(touched - live >= kept, live, touched)
    return touched, given


def _play_point(steps: Steps, sizes: dict[Buffer, int], touched: int, kept: int) -> tuple[int, int]:
    """As _play, for numbers."""
    live = given = 0
    for made, buffer in steps:
        if made:
            live += sizes[buffer]
            if live > touched:
                given += live - touched
                touched = live
        else:
            live -= sizes[buffer]
            if touched - live >= kept:
                touched = live
    return touched, given


@lru_cache(maxsize=64)
def _steps(program: Program) -> tuple[Steps, Counter[Buffer]]:
    """(made or freed, which) one after the other; how often each is made, found ones not."""
    steps: Steps = []
    made: Counter[Buffer] = Counter()
    for segment in program.segments:
        found = is_there(segment)
        for op in chain.from_iterable([segment.ops] * segment.count):
            steps += [(True, buffer) for buffer in op.allocates]
            steps += [(False, buffer) for buffer in op.frees]
            made.update(dict.fromkeys(op.allocates, 0) if found else op.allocates)
    return steps, made
