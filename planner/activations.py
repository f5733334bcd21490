"""Liveness: the largest sum of storages that live at once, when it occurs and what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import numpy as np

from planner.program import Buffer, Dims, Number, Op, Program, Segment, Symbol, maximum

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


Step = tuple[tuple[int, ...], tuple[int, ...]]
"""What an op allocates and frees, as places in a list of sizes."""


class _Layout:
    """A program as numbers: which buffers there are, what each is a product of, who makes them."""

    def __init__(self, program: Program) -> None:
        self.buffers: list[Buffer] = []
        self.segments = program.segments
        self.steps: dict[int, list[Step]] = {}  # by the identity of a segment's ops
        self._symbols: list[Symbol] = []
        self._products: list[tuple[int, ...]] = []  # places of symbols
        self._factors: list[tuple[int, int]] = []  # of each buffer: a number, the product's place
        places: dict[Buffer, int] = {}
        symbols: dict[Symbol, int] = {}
        products: dict[tuple[int, ...], int] = {}

        def place(buffer: Buffer) -> int:
            if buffer not in places:
                places[buffer] = len(self.buffers)
                self.buffers.append(buffer)
                named = [e for e in buffer.shape if not isinstance(e, int)]
                key = tuple(symbols.setdefault(s, len(symbols)) for s in named)
                number = prod(e for e in buffer.shape if isinstance(e, int)) * buffer.itemsize
                self._factors.append((number, products.setdefault(key, len(products))))
            return places[buffer]

        for segment in program.segments:
            if id(segment.ops) not in self.steps:
                self.steps[id(segment.ops)] = [
                    (tuple(map(place, op.allocates)), tuple(map(place, op.frees)))
                    for op in segment.ops
                ]
        self._symbols, self._products = list(symbols), list(products)
        self.nets = {key: _net(steps) for key, steps in self.steps.items()}

    def sizes(self, dims: Dims) -> list[Number]:
        """Bytes of every buffer: each symbol and each product of them is computed once."""
        values = [symbol.of(dims) for symbol in self._symbols]
        products = [prod(values[i] for i in key) for key in self._products]
        return [number * products[at] for number, at in self._factors]


@lru_cache(maxsize=512)
def _layout(program: Program) -> _Layout:
    return _Layout(program)


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
        batch, tokens, context, capacity, encoder = part
        assert batch is not None
        chunk = Dims(
            batch=batch, tokens=tokens, context=context, capacity=capacity, encoder=encoder
        )
        found = _highest(_walks(program, chunk), chunk)
        highest.append(np.broadcast_to(found, batch.shape))
    return np.concatenate(highest).reshape(cells.shape) if highest else np.zeros(cells.shape)


def _sizes(dims: Dims) -> tuple[Number | None, ...]:
    return dims.batch, dims.tokens, dims.context, dims.capacity, dims.encoder


def _highest(walks: Iterable[tuple[Segment, Number, _Walk, int]], dims: Dims) -> Number:
    larger = max if dims.is_point else maximum
    highest: Number = 0
    for _, start, walk, count in walks:
        last = start + walk.net * (count - 1)
        highest = larger(highest, larger(start, last) + walk.top)
    return highest


def _walks(program: Program, dims: Dims) -> Iterator[tuple[Segment, Number, _Walk, int]]:
    """Every segment with the live bytes before it and what one repetition does."""
    layout = _layout(program)
    sizes = layout.sizes(dims)
    point = dims.is_point
    walked: dict[int, _Walk] = {}
    live: Number = 0
    for segment in program.segments:
        key = id(segment.ops)
        if key not in walked:
            steps = layout.steps[key]
            walked[key] = _walk_point(steps, sizes) if point else _walk(steps, sizes)
        walk = walked[key]
        yield segment, live, walk, segment.count
        live = live + walk.net * segment.count


def _walk_point(steps: list[Step], sizes: list[int]) -> _Walk:
    """As _walk, for numbers."""
    live = top = 0
    for allocates, frees in steps:
        for place in allocates:
            live += sizes[place]
        if live > top:
            top = live
        for place in frees:
            live -= sizes[place]
    return _Walk(live, top)


def _walk(steps: list[Step], sizes: list[Number]) -> _Walk:
    live: Number = 0
    top: Number = 0
    for allocates, frees in steps:
        if allocates:
            for place in allocates:
                live = live + sizes[place]
            top = maximum(top, live)
        for place in frees:
            live = live - sizes[place]
    return _Walk(live, top)


def peak(program: Program, dims: Dims) -> Peak:
    """The peak at one point, with the op that causes it and everything that lives there."""
    layout = _layout(program)
    walks = list(_walks(program, dims))
    highest = _highest(walks, dims)
    alive = [0] * len(layout.buffers)
    for segment, start, walk, count in walks:
        key = id(segment.ops)
        in_first = start + walk.top == highest
        before = 0 if in_first else count - 1  # repetitions that have ended
        is_here = in_first or start + walk.net * before + walk.top == highest
        ended = before if is_here else count
        for place, change in layout.nets[key]:
            alive[place] += change * ended
        if is_here:
            sizes = layout.sizes(dims)
            op = segment.ops[_until_top(layout.steps[key], sizes, walk.top, alive)]
            first = segment.first_layer
            layer = None if first is None else first + segment.layer_step * before
            held = zip(layout.buffers, alive, sizes, strict=True)
            found = _snapshot([part for part in held if part[1]], highest, op, layer)
            return replace(found, kernel=op.kernel, phase=segment.phase)
    return Peak(live_bytes=0, cache_bytes=0, op="nothing", layer=None, live=())


def _net(steps: list[Step]) -> list[tuple[int, int]]:
    """How many of each buffer one repetition leaves behind; negative: takes away."""
    change: dict[int, int] = {}
    for allocates, frees in steps:
        for place in allocates:
            change[place] = change.get(place, 0) + 1
        for place in frees:
            change[place] = change.get(place, 0) - 1
    return [(place, number) for place, number in change.items() if number]


def _until_top(steps: list[Step], sizes: list[Number], top: int, alive: list[int]) -> int:
    """Play one repetition up to its highest point; the place of the op that reaches it."""
    live = 0
    for index, (allocates, frees) in enumerate(steps):
        for place in allocates:
            alive[place] += 1
            live += sizes[place]
        if allocates and live == top:
            return index
        for place in frees:
            alive[place] -= 1
            live -= sizes[place]
    raise AssertionError("no op reaches the highest point of its own segment")


def _snapshot(
    held: list[tuple[Buffer, int, int]], live_bytes: int, op: Op, layer: int | None
) -> Peak:
    """What lives at this moment (buffer, how many, bytes of one); alike buffers are one entry."""
    alike: dict[tuple[object, ...], tuple[Buffer, int, int]] = {}
    cache_bytes = gradients_bytes = 0
    for buffer, count, each in held:
        size = count * each
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
