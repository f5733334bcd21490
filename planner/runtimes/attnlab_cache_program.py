"""What each cache of attnlab (kernels/attnlab/) allocates before, in and after a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.layers import GQA
from planner.model import Model
from planner.program import (
    PAST,
    B,
    Buffer,
    C,
    Dims,
    Extent,
    Number,
    S,
    Shape,
    Symbol,
    T,
    Tape,
    minimum,
)
from planner.runtimes.attnlab_masks import Pattern, pattern_of
from planner.runtimes.writer import INT64

CacheKind = Literal["static", "dynamic", "ring", "paged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attended:
    """What attention reads: `keys` of it, and the storages that go when it is done.

    `strided`: keys and values lie [B, S, G, D] in memory.
    """

    keys: Extent
    held: tuple[Buffer, ...] = ()
    strided: Symbol | None = None


ALWAYS = Symbol("1", lambda d: 1)


class CacheProgram:
    """Writes a cache's part of a pass; `b` bytes of a computed element, `kv_b` of a kept one."""

    def __init__(
        self, tape: Tape, kind: CacheKind, *, b: int, kv_b: int, block_tokens: int
    ) -> None:
        self.tape, self.kind, self.b, self.kv_b = tape, kind, b, kv_b
        self.block = block_tokens
        self.old: dict[GQA, tuple[Buffer, Buffer]] = {}
        self.new: dict[GQA, tuple[Buffer, Buffer]] = {}
        self.tables: list[Buffer] = []

    def pattern(self, gqa: GQA) -> Pattern:
        """The kind of mask of a layer over this cache."""
        return pattern_of(gqa, ring=self.kind == "ring")

    def open(self, model: Model) -> None:
        """What is there before the pass: the preallocated cache, or what a growing one holds."""
        for start, count, layer in model.layer_groups():
            gqa = layer.attention
            assert isinstance(gqa, GQA)
            label = f"cache of {hash(gqa)}"
            if self.tape.again(label, count=count, first_layer=start):
                continue
            with self.tape.segment(label, count=count, first_layer=start):
                self._open_layer(gqa)

    def _open_layer(self, gqa: GQA) -> None:
        G, D = gqa.num_key_value_heads, gqa.head_dim
        if self.kind != "dynamic":
            shape: Shape = (2, B, G, self._slots(gqa), D)
            self.tape.new("keys and values", shape, self.kv_b, cache=True)
            return
        old, new = [], []
        for name in ("keys", "values"):
            old.append(self.tape.new(name, (B, G, PAST, D), self.kv_b, cache=True))
            new.append(Buffer(name=name, shape=(B, G, S, D), itemsize=self.kv_b, cache=True))
        self.old[gqa], self.new[gqa] = (old[0], old[1]), (new[0], new[1])

    def _slots(self, gqa: GQA) -> Extent:
        window, block = gqa.sliding_window, self.block
        if self.kind == "ring" and window is not None:
            return Symbol(f"min(C, {window})", lambda d: minimum(_capacity(d), window))
        if self.kind == "paged":
            return Symbol(
                f"(-(-C // {block}) · {block})", lambda d: -(-_capacity(d) // block) * block
            )
        return C

    def prepare(self, model: Model) -> None:
        """`begin`: where queries and keys stand, and, by kind, what goes where."""
        tape = self.tape
        self.tables = [tape.new("positions", (T,), INT64)]
        if self.kind == "paged":
            self._block_tables()
        else:
            self.tables.append(tape.new("positions", (S,), INT64))
        if self.kind == "ring":
            attentions = [layer.attention for layer in model.layer_kinds()]
            patterns = [self.pattern(gqa) for gqa in attentions if isinstance(gqa, GQA)]
            for pattern in {p.window: p for p in patterns if p.ring}.values():  # one of a size
                self._turn(pattern)

    def _block_tables(self) -> None:
        """Slots of every position, and the lists of what is written."""
        tape, block = self.tape, self.block
        row = Symbol(f"(-(-S // {block}))", lambda d: -(-d.context // block))
        first = tape.new("block table", (B, row), INT64)
        first = self._replaced(tape.new("block table", (B, row), INT64), first)
        within = tape.new("block table", (block,), INT64)
        slots = tape.new("slots", (B, row, block), INT64)
        lists = tape.new("slots", (3, B, T), INT64)
        keys = tape.new("positions", (S,), INT64)
        targets = tape.new("slots", (B, T), INT64)
        tape.free(first, within)
        self.tables += [slots, lists, keys, targets]

    def _replaced(self, new: Buffer, old: Buffer) -> Buffer:
        self.tape.free(old)
        return new

    def _turn(self, pattern: Pattern) -> None:
        """Where the keys of a turned ring stand, and which of them stay."""
        scratch = [self.tape.new("ring", (pattern.turned, pattern.size), INT64) for _ in range(4)]
        self.tape.free(*scratch)
        self.tables += [
            self.tape.new("ring", (pattern.turned_one, pattern.size), INT64),
            self.tape.new("ring", (pattern.turned_several, pattern.size), INT64),
            self.tape.new("ring", (pattern.turned_several, pattern.keys), INT64),
        ]

    def close(self) -> None:
        """`advance`, and the masks that held positions."""
        self.tape.free(*self.tables)

    def append(self, gqa: GQA, k: Buffer, v: Buffer, shared: tuple[Buffer, ...]) -> Attended:
        """`append` of one layer; k and v go, unless they are `shared` with the query's storage."""
        mine = tuple({k, v} - set(shared))
        pattern = self.pattern(gqa)
        match self.kind:
            case "dynamic":
                self._grow(gqa)
            case "ring" if pattern.ring:
                return self._turn_ring(gqa, pattern, mine)
            case "paged":
                held = self._gather(gqa)
                self.tape.free(*mine)
                return self._cast(gqa, Attended(keys=S, held=held, strided=ALWAYS))
        self.tape.free(*mine)
        return self._cast(gqa, Attended(keys=S))

    def _grow(self, gqa: GQA) -> None:
        G, D, tape = gqa.num_key_value_heads, gqa.head_dim, self.tape
        cast: Buffer | None = None
        for old, new in zip(self.old[gqa], self.new[gqa], strict=True):
            if self.kv_b != self.b:
                fresh = tape.new("cast for the cache", (B, G, T, D), self.kv_b)
                tape.free(cast)
                cast = fresh
            tape.new(new.name, new.shape, self.kv_b, reads=(old,), cache=True, into=new)
            tape.free(old)
        tape.free(cast)

    def _gather(self, gqa: GQA) -> tuple[Buffer, Buffer]:
        G, D, tape = gqa.num_key_value_heads, gqa.head_dim, self.tape
        out = []
        for name in ("gathered keys", "gathered values"):
            listed = tape.new("listed for the cache", (B, T, G, D), self.b)
            if self.kv_b != self.b:
                listed = self._replaced(
                    tape.new("cast for the cache", (B, T, G, D), self.kv_b), listed
                )
            tape.free(listed)
            out.append(tape.new(name, (B, S, G, D), self.kv_b, moved=((B, S, G, D, self.kv_b),)))
        return out[0], out[1]

    def _turn_ring(self, gqa: GQA, pattern: Pattern, mine: tuple[Buffer, ...]) -> Attended:
        """A ring after it turned; before, everything here is 0 bytes and k and v go at once."""
        G, D, tape, kv_b = gqa.num_key_value_heads, gqa.head_dim, self.tape, self.kv_b
        casts: list[Buffer] = []
        if kv_b != self.b:
            shape: Shape = (pattern.turned, B, G, T, D)
            casts = [tape.new("cast for the cache", shape, kv_b) for _ in "kv"]
        both = [
            tape.new(name, (pattern.joined, B, G, pattern.keys, D), kv_b)
            for name in ("joined keys", "joined values")
        ]
        for _ in "kv":
            shape = (pattern.turned_several, B, G, pattern.size, D)
            tape.free(tape.new("kept in the ring", shape, kv_b))
        tape.free(*casts, *mine)
        own = [  # a first pass longer than the window attends to its own
            tape.new("own keys, values", (pattern.alone, *x.shape), x.itemsize)
            for x in casts or mine
        ]
        return self._cast(
            gqa, Attended(keys=pattern.keys, held=(*both, *own), strided=pattern.alone)
        )

    def _cast(self, gqa: GQA, attended: Attended) -> Attended:
        """Attention computes in the model's dtype, whatever the cache keeps."""
        if self.kv_b == self.b:
            return attended
        shape = (B, gqa.num_key_value_heads, attended.keys, gqa.head_dim)
        casts = tuple(self.tape.new("cast keys, values", shape, self.b) for _ in range(2))
        self.tape.free(*attended.held)
        return Attended(keys=attended.keys, held=casts, strided=attended.strided)


def _capacity(d: Dims) -> Number:
    return d.context if d.capacity is None else d.capacity
