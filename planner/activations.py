"""Liveness: the largest sum of storages that live at once, when it occurs and what they are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from planner.program import Buffer, Dims, Number, Op, Program, maximum


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The largest sum of live storages of a pass.

    `buffers` are (name, how many, bytes of all) of what lives then, largest first; `cache_bytes` is
    the part of `live_bytes` that is KV cache.
    """

    live_bytes: int
    cache_bytes: int
    op: str
    layer: int | None
    buffers: tuple[tuple[str, int, int], ...]


def peak_bytes(program: Program, dims: Dims) -> Number:
    """Peak of the storages that the pass creates, over every cell of `dims`.

    A segment that repeats is walked once: its net growth is the same at each repetition, so the
    peak lies in the last (growth ≥ 0) or the first one.
    """
    live: Number = 0
    peak: Number = 0
    walked: dict[int, tuple[Number, Number]] = {}
    for segment in program.segments:
        key = id(segment.ops)
        if key not in walked:
            walked[key] = _walk(segment.ops, dims)
        net, top = walked[key]
        last = live + net * (segment.count - 1)
        peak = maximum(peak, maximum(live, last) + top)
        live = last + net
    return peak


def _walk(ops: tuple[Op, ...], dims: Dims) -> tuple[Number, Number]:
    """(net growth, highest point above the start) of one repetition."""
    live: Number = 0
    top: Number = 0
    for op in ops:
        for buffer in op.allocates:
            live = live + buffer.nbytes(dims)
        if op.allocates:
            top = maximum(top, live)
        for buffer in op.frees:
            live = live - buffer.nbytes(dims)
    return live, top


def peak(program: Program, dims: Dims) -> Peak:
    """The peak at one point, with the op that causes it and everything that lives there."""
    height = peak_bytes(program, dims)
    alive: Counter[Buffer] = Counter()
    live = 0
    for segment in program.segments:
        for repetition in range(segment.count):
            for op in segment.ops:
                for buffer in op.allocates:
                    alive[buffer] += 1
                    live += buffer.nbytes(dims)
                if op.allocates and live == height:
                    first = segment.first_layer
                    layer = None if first is None else first + repetition
                    return _snapshot(alive, live, dims, op.name, layer)
                for buffer in op.frees:
                    alive[buffer] -= 1
                    live -= buffer.nbytes(dims)
    return Peak(live_bytes=0, cache_bytes=0, op="nothing", layer=None, buffers=())


def _snapshot(alive: Counter[Buffer], live: int, dims: Dims, op: str, layer: int | None) -> Peak:
    """What lives at this moment, buffers of one name together."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    cache_bytes = 0
    for buffer, count in alive.items():
        size = count * buffer.nbytes(dims)
        if buffer.cache:
            cache_bytes += size
        elif size:
            counts[buffer.name] += count
            sizes[buffer.name] += size
    return Peak(
        live_bytes=live,
        cache_bytes=cache_bytes,
        op=op,
        layer=layer,
        buffers=tuple((name, counts[name], size) for name, size in sizes.most_common()),
    )
