"""Liveness: the largest sum of storages that live at once, when it occurs and what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from planner.program import Buffer, Dims, Number, Op, Program, Segment, maximum

CHUNK_CELLS = 8192
"""Cells of a grid that are walked at once: what they need stays in the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The largest sum of live storages of a pass.

    `live` are (buffer, how many, bytes of all) of what lives then besides the KV cache, largest
    first; `cache_bytes` is the cache's part of `live_bytes`, `gradients_bytes` that of finished
    gradients. `kernel` is torch's op where the program says so, `phase` the part of the pass.
    """

    live_bytes: int
    cache_bytes: int
    op: str
    layer: int | None
    live: tuple[tuple[Buffer, int, int], ...]
    gradients_bytes: int = 0
    kernel: str = ""
    phase: str = ""

    @property
    def buffers(self) -> tuple[tuple[str, int, int], ...]:
        """(name, how many, bytes of all), buffers of one name together, largest first."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for buffer, count, size in self.live:
            counts[buffer.name] += count
            sizes[buffer.name] += size
        return tuple((name, counts[name], size) for name, size in sizes.most_common())


@dataclass(frozen=True, slots=True)
class _Walk:
    """One repetition of a segment: its net growth and the highest point above its start."""

    net: Number
    top: Number


def peak_bytes(program: Program, dims: Dims) -> Number:
    """Peak of the storages that the pass creates, over every cell of `dims`.

    A segment that repeats is walked once: its net growth is the same at each repetition, so the
    peak lies in the last (growth ≥ 0) or the first one.
    """
    if dims.is_point:
        return _highest(_walks(program, dims), dims)
    cells = np.broadcast(*(size for size in _sizes(dims) if size is not None))
    flat = [None if x is None else np.broadcast_to(x, cells.shape).ravel() for x in _sizes(dims)]
    highest = []
    for start in range(0, cells.size, CHUNK_CELLS):
        part = [None if x is None else x[start : start + CHUNK_CELLS] for x in flat]
        assert part[0] is not None
        chunk = Dims(batch=part[0], tokens=part[1], context=part[2], capacity=part[3])
        found = _highest(_walks(program, chunk), chunk)
        highest.append(np.broadcast_to(found, part[0].shape))
    return np.concatenate(highest).reshape(cells.shape) if highest else np.zeros(cells.shape)


def _sizes(dims: Dims) -> tuple[Number, Number, Number, Number | None]:
    return dims.batch, dims.tokens, dims.context, dims.capacity


def _highest(walks: Iterable[tuple[Segment, Number, _Walk, int]], dims: Dims) -> Number:
    larger = max if dims.is_point else maximum
    highest: Number = 0
    for _, start, walk, count in walks:
        last = start + walk.net * (count - 1)
        highest = larger(highest, larger(start, last) + walk.top)
    return highest


def _walks(program: Program, dims: Dims) -> Iterator[tuple[Segment, Number, _Walk, int]]:
    """Every segment with the live bytes before it and what one repetition does."""
    walked: dict[int, _Walk] = {}
    sizes: dict[Buffer, Number] = {}
    live: Number = 0
    for segment in program.segments:
        key = id(segment.ops)
        if key not in walked:
            walked[key] = _walk(segment.ops, dims, sizes)
        walk = walked[key]
        yield segment, live, walk, segment.count
        live = live + walk.net * segment.count


def _walk(ops: tuple[Op, ...], dims: Dims, sizes: dict[Buffer, Number]) -> _Walk:
    """`sizes` keeps what was evaluated before."""
    larger = max if dims.is_point else maximum
    live: Number = 0
    top: Number = 0
    for op in ops:
        for buffer in op.allocates:
            size = sizes.get(buffer)
            if size is None:
                size = sizes[buffer] = buffer.nbytes(dims)
            live = live + size
        if op.allocates:
            top = larger(top, live)
        for buffer in op.frees:
            size = sizes.get(buffer)
            if size is None:
                size = sizes[buffer] = buffer.nbytes(dims)
            live = live - size
    return _Walk(live, top)


def peak(program: Program, dims: Dims) -> Peak:
    """The peak at one point, with the op that causes it and everything that lives there."""
    walks = list(_walks(program, dims))
    highest = _highest(walks, dims)
    alive: Counter[Buffer] = Counter()
    nets: dict[int, Counter[Buffer]] = {}
    for segment, start, walk, count in walks:
        key = id(segment.ops)
        if key not in nets:
            nets[key] = _net_buffers(segment.ops)
        in_first = start + walk.top == highest
        before = 0 if in_first else count - 1  # repetitions that have ended
        if in_first or start + walk.net * before + walk.top == highest:
            for buffer, change in nets[key].items():
                alive[buffer] += change * before
            op = _until_top(segment.ops, walk.top, alive, dims)
            first = segment.first_layer
            layer = None if first is None else first + segment.layer_step * before
            return replace(
                _snapshot(alive, highest, dims, op, layer), kernel=op.kernel, phase=segment.phase
            )
        for buffer, change in nets[key].items():
            alive[buffer] += change * count
    return Peak(live_bytes=0, cache_bytes=0, op="nothing", layer=None, live=())


def _net_buffers(ops: tuple[Op, ...]) -> Counter[Buffer]:
    """How many of each buffer one repetition leaves behind; negative: takes away."""
    change: Counter[Buffer] = Counter(buffer for op in ops for buffer in op.allocates)
    change.subtract(buffer for op in ops for buffer in op.frees)
    return Counter({buffer: number for buffer, number in change.items() if number})


def _until_top(ops: tuple[Op, ...], top: int, alive: Counter[Buffer], dims: Dims) -> Op:
    """Play one repetition up to its highest point; the op that reaches it."""
    live = 0
    for op in ops:
        alive.update(op.allocates)
        live += sum(buffer.nbytes(dims) for buffer in op.allocates)
        if op.allocates and live == top:
            return op
        alive.subtract(op.frees)
        live -= sum(buffer.nbytes(dims) for buffer in op.frees)
    raise AssertionError("no op reaches the highest point of its own segment")


def _snapshot(
    alive: Counter[Buffer], live_bytes: int, dims: Dims, op: Op, layer: int | None
) -> Peak:
    """What lives at this moment; buffers that are alike are one entry."""
    alike: dict[tuple[object, ...], tuple[Buffer, int, int]] = {}
    cache_bytes = gradients_bytes = 0
    for buffer, count in alive.items():
        size = count * buffer.nbytes(dims)
        if buffer.cache:
            cache_bytes += size
        elif buffer.gradient:
            gradients_bytes += size
        elif size:
            key = (buffer.name, buffer.shape, buffer.itemsize)
            _, counted, total = alike.get(key, (buffer, 0, 0))
            alike[key] = (buffer, counted + count, total + size)
    live = sorted((entry for entry in alike.values() if entry[2]), key=lambda entry: -entry[2])
    return Peak(
        live_bytes=live_bytes,
        cache_bytes=cache_bytes,
        op=op.name,
        layer=layer,
        live=tuple(live),
        gradients_bytes=gradients_bytes,
    )
