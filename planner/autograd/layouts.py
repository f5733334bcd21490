"""Sizes and strides by torch's rules: what is a view, what needs a copy, how a result lies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

Ints = tuple[int, ...]


@lru_cache(maxsize=1 << 14)
def contiguous(sizes: Ints) -> Ints:
    """Strides of a row-major tensor."""
    strides, step = [0] * len(sizes), 1
    for d in range(len(sizes) - 1, -1, -1):
        strides[d] = step
        step *= sizes[d]
    return tuple(strides)


def is_contiguous(sizes: Ints, strides: Ints) -> bool:
    """Row-major, whatever the strides of dimensions of one."""
    wanted = contiguous(sizes)
    return strides == wanted or _same(sizes, strides, wanted)


def _same(sizes: Ints, strides: Ints, wanted: Ints) -> bool:
    return all(n == 1 or s == w for n, s, w in zip(sizes, strides, wanted, strict=True))


def is_dense(sizes: Ints, strides: Ints) -> bool:
    """Non-overlapping and dense: row-major in some order of the dimensions."""
    step = 1
    for stride, size in sorted((s, n) for n, s in zip(sizes, strides, strict=True) if n != 1):
        if stride != step:
            return False
        step *= size
    return True


def view(sizes: Ints, strides: Ints, wanted: Ints) -> Ints | None:
    """Strides of a view of `wanted` sizes; None where only a copy has them.

    at::detail::computeStride (ATen/TensorUtils.cpp): neighbouring dimensions that lie one in the
    other without a gap are one chunk, and each chunk is divided up anew.
    """
    new = [0] * len(wanted)
    at = len(wanted) - 1
    chunk_stride = strides[-1] if strides else 1
    chunk, divided = 1, 1
    for d in range(len(sizes) - 1, -1, -1):
        chunk *= sizes[d]
        ends = d == 0 or (sizes[d - 1] != 1 and strides[d - 1] != chunk * chunk_stride)
        if not ends:
            continue
        while at >= 0 and (divided < chunk or wanted[at] == 1):
            new[at] = divided * chunk_stride
            divided *= wanted[at]
            at -= 1
        if divided != chunk:
            return None
        if d > 0:
            chunk_stride, chunk, divided = strides[d - 1], 1, 1
    return tuple(new) if at == -1 else None


def elementwise(sizes: Ints, operands: Sequence[tuple[Ints, Ints]]) -> Ints:
    """Strides of what an elementwise op makes of operands (sizes, strides).

    TensorIterator (ATen/TensorIterator.cpp): row-major where all are, channels-last where all are;
    as they lie where all lie alike; else dimensions are sorted by the strides of the first operand
    that tells them apart.
    """
    whole = [s for n, s in operands if n == sizes]
    if len(whole) == len(operands):
        if all(is_contiguous(sizes, s) for s in whole):
            return contiguous(sizes)
        if len(sizes) == 4 and all(_same(sizes, s, channels_last(sizes)) for s in whole):
            return channels_last(sizes)
        if is_dense(sizes, whole[0]) and all(s == whole[0] for s in whole):
            return whole[0]
    spread = [_broadcast(sizes, n, s) for n, s in operands]
    order = list(range(len(sizes)))[::-1]  # innermost first
    for i in range(1, len(order)):
        moving = i
        for other in range(i - 1, -1, -1):
            compared = _compare(sizes, spread, order[other], order[moving])
            if compared > 0:
                order[other], order[moving] = order[moving], order[other]
                moving = other
            elif compared < 0:
                break
    strides, step = [0] * len(sizes), 1
    for d in order:
        strides[d] = step
        step *= sizes[d]
    return tuple(strides)


def _broadcast(sizes: Ints, own: Ints, strides: Ints) -> Ints:
    """An operand's strides, 0 where it is repeated."""
    lead = len(sizes) - len(own)
    kept = (
        0 if n == 1 and sizes[lead + i] != 1 else s
        for i, (n, s) in enumerate(zip(own, strides, strict=True))
    )
    return (*(0,) * lead, *kept)


def _compare(sizes: Ints, operands: Sequence[Ints], a: int, b: int) -> int:
    """Above 0 where dimension a, now further in, should stand outside b."""
    for strides in operands:
        if strides[a] == 0 or strides[b] == 0:
            continue
        if strides[a] != strides[b]:
            return 1 if strides[a] > strides[b] else -1
        if sizes[a] > sizes[b]:
            return 1
    return 0


def preserved(sizes: Ints, strides: Ints) -> Ints:
    """Strides of a copy that keeps the format (clone, a cast): as they lie, gaps closed."""
    return strides if is_dense(sizes, strides) else elementwise(sizes, [(sizes, strides)])


def is_whole(sizes: Ints, strides: Ints, operands: Sequence[tuple[Ints, Ints]]) -> bool:
    """Whether all operands lie as the result does, without gaps: one run of elements.

    TensorIterator::is_contiguous after its dimensions are coalesced. Numbers are no operands.
    """
    return is_dense(sizes, strides) and all(
        own == () or (own == sizes and _same(sizes, laid, strides)) for own, laid in operands
    )


SECTOR_BYTES, BLOCK_ELEMENTS = 32, 256
"""What a GPU reads at the least, and elements that one block of threads writes, two by each of 128
(ATen/native/cuda/CUDALoops.cuh: elementwise_kernel<128, 2>; of two bytes they are four each)."""


def reach(sizes: Ints, strides: Ints, operands: Sequence[tuple[Ints, Ints, int]]) -> str:
    """Whether an operand (sizes, strides, itemsize) is read across what is written.

    Neighbours in the result then lie in sectors of their own. "across": a block of threads uses
    these up, or they are read again, as an operand is repeated. "far": less than half of them lie
    together in a block, so that others read the same sectors later. Empty: none is.
    """
    order = sorted((d for d in range(len(sizes)) if sizes[d] > 1), key=lambda d: strides[d])
    found = ""
    for own, laid, itemsize in operands:
        steps = _broadcast(sizes, own, laid)
        if not order or steps[order[0]] * itemsize < SECTOR_BYTES:
            continue
        repeated = any(steps[d] == 0 for d in order)
        run = 1
        for d in order:
            if steps[d] * itemsize < SECTOR_BYTES:
                break
            run *= sizes[d]
        if not repeated and run >= BLOCK_ELEMENTS // 2:
            return "far"
        found = "across"
    return found


def is_channels_last(sizes: Ints, strides: Ints) -> bool:
    """Whether torch takes four dimensions for a channels-last image (c10/core/MemoryFormat.h)."""
    if len(sizes) != 4 or strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if strides[d] < least or (d == 0 and least == strides[1]):
            return False
        least = strides[d] * sizes[d]  # a size of 1 changes nothing
    return True


def channels_last(sizes: Ints) -> Ints:
    """Strides of a channels-last tensor of four dimensions."""
    _, C, H, W = sizes
    return (C * H * W, 1, W * C, C)
