"""What each cache of attnlab (kernels/attnlab/) allocates before, in and after a pass."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from planner.kv_formats import KvFormat
from planner.layers import GQA, MLA
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
from planner.runtimes.attnlab_codec_program import Rows, decode, encode
from planner.runtimes.attnlab_formats import Stored, check_groups, parts, stored_streams
from planner.runtimes.attnlab_kivi_program import FIRST, KiviStream
from planner.runtimes.attnlab_masks import Pattern, pattern_of
from planner.runtimes.writer import INT64

CacheKind = Literal["static", "dynamic", "ring", "paged", "quantised"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Attended:
    """What attention reads: `keys` of it, and the storages that go when it is done.

    `strided`: keys and values lie [B, S, G, D] in memory.
    """

    keys: Extent
    held: tuple[Buffer, ...] = ()
    strided: Symbol | None = None


ALWAYS = Symbol("1", lambda d: 1)


def streams(attention: GQA | MLA, itemsize: int) -> tuple[Stored, ...]:
    """cache.streams: keys and values; of MLA the latent with the rotary key behind it."""
    match attention:
        case GQA(num_key_value_heads=G, head_dim=D):
            made = [("keys", G, D), ("values", G, D)]
        case MLA(kv_lora_rank=d_c, qk_rope_head_dim=d_rope):
            made = [("latents", 1, d_c + d_rope)]
    return tuple(Stored(name=n, heads=G, width=D, itemsize=itemsize) for n, G, D in made)


class CacheProgram:
    """Writes a cache's part of a pass; `b` bytes of a computed element, `kv_b` of a kept one.

    `form`: of codes and scales, which attention reads in the dtype of the computation.
    """

    def __init__(
        self,
        tape: Tape,
        kind: CacheKind,
        *,
        b: int,
        kv_b: int,
        block_tokens: int,
        form: KvFormat | None = None,
    ) -> None:
        self.tape, self.kind, self.b, self.kv_b = tape, kind, b, kv_b if form is None else b
        self.form = form
        self.block = block_tokens
        self.old: dict[GQA | MLA, list[Buffer]] = {}
        self.new: dict[GQA | MLA, list[Buffer]] = {}
        self.kivi: dict[GQA | MLA, list[KiviStream]] = {}
        self.tables: list[Buffer] = []

    def pattern(self, attention: GQA | MLA) -> Pattern:
        """The kind of mask of a layer over this cache."""
        return pattern_of(attention, ring=self.kind == "ring")

    def open(self, model: Model) -> None:
        """What is there before the pass: the preallocated cache, or what a growing one holds."""
        for start, count, layer in model.layer_groups():
            attention = layer.attention
            assert isinstance(attention, GQA | MLA)
            label = f"cache of {hash(attention)}"
            if self.tape.again(label, count=count, first_layer=start):
                continue
            with self.tape.segment(label, count=count, first_layer=start):
                self._open_layer(attention)

    def kept(self, attention: GQA | MLA) -> tuple[Stored, ...]:
        """The streams that slots hold."""
        if self.form is None:
            return streams(attention, self.kv_b)
        return stored_streams(self.form, attention)

    @property
    def _casts(self) -> bool:
        """Whether what is new is cast to what is kept."""
        return self.form is None and self.kv_b != self.b

    def _open_layer(self, attention: GQA | MLA) -> None:
        if self.kind == "quantised":
            assert self.form is not None
            assert isinstance(attention, GQA)
            self.kivi[attention] = [
                KiviStream(self.tape, name, attention, tensor, b=self.b)
                for name, _, _, tensor in parts(self.form, attention)
            ]
            for kivi in self.kivi[attention]:
                kivi.open()
            return
        kept = self.kept(attention)
        if self.kind != "dynamic":  # neighbours of one size lie in one piece of memory
            for (G, D, item), run in groupby(kept, lambda x: (x.heads, x.width, x.itemsize)):
                names = [stream.name for stream in run]
                shape: Shape = (len(names), B, G, self._slots(attention), D)
                self.tape.new(" and ".join(names), shape, item, cache=True)
            return
        self.old[attention], self.new[attention] = [], []
        for stream in kept:
            G, D = stream.heads, stream.width
            old = self.tape.new(stream.name, (B, G, PAST, D), stream.itemsize, cache=True)
            new = Buffer(name=stream.name, shape=(B, G, S, D), itemsize=old.itemsize, cache=True)
            self.old[attention].append(old)
            self.new[attention].append(new)

    def _slots(self, attention: GQA | MLA) -> Extent:
        window = attention.sliding_window if isinstance(attention, GQA) else None
        if self.kind == "ring" and window is not None:
            return Symbol(f"min(C, {window})", lambda d: minimum(_capacity(d), window))
        if self.kind == "paged":
            block = self.block
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

    def append(
        self, attention: GQA | MLA, new: tuple[Buffer, ...], shared: tuple[Buffer, ...] = ()
    ) -> Attended:
        """`append` of one layer; what is new goes, unless `shared` with the query's storage."""
        mine = tuple(x for x in dict.fromkeys(new) if x not in shared)
        if self.form is None:
            return self._cast(attention, self._keep(attention, mine))
        if self.kind == "quantised":
            made = zip(self.kivi[attention], new, strict=True)
            held = [buffer for kivi, x in made for buffer in kivi.append(x)]
            self.tape.free(*mine)
            held += [self.tape.new("own keys, values", (FIRST, *x.shape), self.b) for x in mine]
            return Attended(keys=S, held=tuple(held), strided=FIRST)
        attended = self._keep(attention, self._encode(attention))
        read = self._decode(attention, attended.keys)
        self.tape.free(*attended.held, *mine)
        return Attended(keys=attended.keys, held=read)

    def _encode(self, attention: GQA | MLA) -> tuple[Buffer, ...]:
        """Codes and scales of what is new."""
        assert self.form is not None
        stored: list[Buffer] = []
        for which, (name, *_) in enumerate(parts(self.form, attention)):
            stored += encode(self.tape, self._rows(attention, which, T), b=self.b, name=name)
        return tuple(stored)

    def _decode(self, attention: GQA | MLA, keys: Extent) -> tuple[Buffer, ...]:
        """What attention reads; of MLA in one tensor."""
        assert self.form is not None
        read = [
            decode(
                self.tape,
                self._rows(attention, which, keys),
                b=self.b,
                name=f"read {name}",
                whole=self.kind == "dynamic",
            )
            for which, (name, *_) in enumerate(parts(self.form, attention))
        ]
        if isinstance(attention, GQA):
            return tuple(read)
        (stream,) = streams(attention, self.b)
        shape = (B, 1, keys, stream.width)
        joined = self.tape.new("read latents", shape, self.b, reads=tuple(read), kernel="cat")
        self.tape.free(*read)
        return (joined,)

    def _rows(self, attention: GQA | MLA, which: int, tokens: Extent) -> Rows:
        assert self.form is not None
        _, heads, width, tensor = parts(self.form, attention)[which]
        g = check_groups(tensor, width)
        return Rows(leading=(B, heads, tokens), groups=(width // g,), g=g, form=tensor)

    def _keep(self, attention: GQA | MLA, new: tuple[Buffer, ...]) -> Attended:
        """What is in the slots then; what is new goes, unless it is that."""
        pattern = self.pattern(attention)
        match self.kind:
            case "dynamic":
                self._grow(attention)
            case "ring" if pattern.ring:
                return self._turn_ring(attention, pattern, new)
            case "paged":
                held = self._gather(attention)
                self.tape.free(*new)
                return Attended(keys=S, held=held, strided=ALWAYS)
        if self.kind != "dynamic":
            self._fill(attention)
        self.tape.free(*new)
        return Attended(keys=S)

    def _fill(self, attention: GQA | MLA) -> None:
        """Each stream's new rows written behind those that are there, slots of others between."""
        for stream in self.kept(attention):
            self._write(stream, (B, stream.heads, T, stream.width))

    def _write(self, stream: Stored, written: Shape) -> None:
        made = self.b if self._casts else stream.itemsize
        moved = ((*written, stream.itemsize), (*written, made))
        loop = "strided cast" if self._casts else "strided"
        self.tape.run(f"kept {stream.name}", moved=moved, kernel="copy_", loop=loop)

    def _grow(self, attention: GQA | MLA) -> None:
        tape, cast = self.tape, None
        kept = zip(self.kept(attention), self.old[attention], self.new[attention], strict=True)
        for stream, old, new in kept:
            if self._casts:
                shape = (B, stream.heads, T, stream.width)
                fresh = tape.new("cast for the cache", shape, self.kv_b)
                tape.free(cast)
                cast = fresh
            tape.new(new.name, new.shape, new.itemsize, reads=(old,), cache=True, into=new)
            tape.free(old)
        tape.free(cast)

    def _gather(self, attention: GQA | MLA) -> tuple[Buffer, ...]:
        """What is new picked by its lists and put into its slots, then all rows picked by theirs:
        heads and width of a token lie together.
        """
        tape, out = self.tape, []
        for stream in self.kept(attention):
            rows: Shape = (stream.heads, stream.width)
            item = self.b if self._casts else stream.itemsize
            name, new = "listed for the cache", (B, T, *rows)
            listed = tape.new(
                name, new, item, moved=((*new, item),), kernel="index", loop="strided"
            )
            if self._casts:
                cast = tape.new(
                    "cast for the cache",
                    new,
                    self.kv_b,
                    moved=((*new, item),),
                    kernel="_to_copy",
                    loop="cast",
                )
                listed = self._replaced(cast, listed)
            put = ((*new, stream.itemsize), (*new, stream.itemsize))
            tape.run(f"kept {stream.name}", moved=put, kernel="index_put_")
            tape.free(listed)
            moved = ((B, S, *rows, stream.itemsize),)
            name = f"gathered {stream.name}"
            out.append(tape.new(name, (B, S, *rows), stream.itemsize, moved=moved, kernel="index"))
        return tuple(out)

    def _turn_ring(
        self, attention: GQA | MLA, pattern: Pattern, mine: tuple[Buffer, ...]
    ) -> Attended:
        """A ring after it turned; before, all here is 0 bytes and what is new goes at once."""
        tape, kept = self.tape, self.kept(attention)
        casts: list[Buffer] = []
        if self._casts:
            casts = [
                tape.new("cast for the cache", (pattern.turned, B, x.heads, T, x.width), x.itemsize)
                for x in kept
            ]
        joined = [
            tape.new(
                f"joined {x.name}", (pattern.joined, B, x.heads, pattern.keys, x.width), x.itemsize
            )
            for x in kept
        ]
        for x in kept:
            shape = (pattern.turned_several, B, x.heads, pattern.size, x.width)
            picked = (*shape, x.itemsize)
            tape.free(
                tape.new("kept in the ring", shape, x.itemsize, moved=(picked,), kernel="gather")
            )
            self._write(x, shape)
            self._write(x, (pattern.turned_one, B, x.heads, 1, x.width))
        tape.free(*casts, *mine)
        own = [  # a first pass longer than the window attends to its own
            tape.new("own keys, values", (pattern.alone, *x.shape), x.itemsize)
            for x in casts or mine
        ]
        return Attended(keys=pattern.keys, held=(*joined, *own), strided=pattern.alone)

    def _cast(self, attention: GQA | MLA, attended: Attended) -> Attended:
        """Attention computes in the model's dtype, whatever the cache keeps."""
        if not self._casts:
            return attended
        loop = "cast" if self.kind == "dynamic" else "strided cast"
        casts = tuple(
            self.tape.new(
                f"cast {x.name}",
                (B, x.heads, attended.keys, x.width),
                self.b,
                moved=((B, x.heads, attended.keys, x.width, self.kv_b),),
                kernel="_to_copy",
                loop=loop,
            )
            for x in streams(attention, self.b)
        )
        self.tape.free(*attended.held)
        return Attended(keys=attended.keys, held=casts, strided=attended.strided)


def _capacity(d: Dims) -> Number:
    return d.context if d.capacity is None else d.capacity
