"""KIVI's cache of attnlab as ops (kernels/attnlab/kivi.py).

A pass joins the residual and what is new, reads the codes that are there, joins both for attention,
and encodes what has become old enough.
"""

from __future__ import annotations

from planner.kv_formats import TensorFormat
from planner.layers import GQA
from planner.program import PAST, B, Buffer, Dims, Number, S, Shape, Symbol, T, Tape, maximum
from planner.runtimes.attnlab_codec_program import CODE, Rows, decode, encode

FIRST = Symbol("(T == S)", lambda d: (d.tokens == d.context) * 1)
LATER = Symbol("(T < S)", lambda d: (d.tokens < d.context) * 1)


class KiviStream:
    """Keys or values of one kind of layer, before and after a pass; `b` bytes of an element."""

    def __init__(self, tape: Tape, name: str, gqa: GQA, form: TensorFormat, *, b: int) -> None:
        assert form.scales is not None
        assert form.residual is not None
        assert form.scales.group_size is not None
        self.tape, self.name, self.form, self.b = tape, name, form, b
        self.G, self.D = gqa.num_key_value_heads, gqa.head_dim
        self.R, self.g, self.rule = form.residual.tokens, form.scales.group_size, form.residual.rule
        self.old, self.new = self._stored(PAST), self._stored(S)
        self.quantised = self._quantised(PAST)

    def open(self) -> None:
        """What it holds of the passes before."""
        for buffer in self.old:
            self.tape.new(buffer.name, buffer.shape, buffer.itemsize, into=buffer)

    def append(self, x: Buffer) -> tuple[Buffer, Buffer]:
        """What attention reads, one of the two; of a first pass neither: what is new itself."""
        tape, b, name = self.tape, self.b, self.name
        rows: Shape = (self.G, self.D)
        *old, residual = self.old
        shape = (LATER, B, _sum(self._residual(PAST), T), *rows)
        newest = tape.new(f"newest {name}", shape, b, reads=(residual, x), kernel="cat")
        tape.free(residual)
        some = Symbol(f"({self.quantised.name} > 0)", lambda d: (self.quantised.of(d) > 0) * 1)
        decoded = decode(tape, self._rows(self.quantised), b=b, name=f"read {name}", whole=True)
        joined = (decoded, newest)
        across = "" if self.rule == "window" else "joined"  # keys were decoded channel by channel
        read = tape.new(
            f"read {name}", (some, B, S, *rows), b, reads=joined, kernel="cat", loop=across
        )
        tape.free(decoded)
        aged = self._aged()
        coded = encode(tape, self._rows(aged), b=b, name=name)
        *new, left = self.new
        joins = Symbol(
            f"({aged.name} > 0 and {self.quantised.name} > 0)",
            lambda d: (aged.of(d) > 0) * some.of(d),
        )
        for before, after, made in zip(old, new, coded, strict=True):
            both = (joins, *after.shape, after.itemsize)  # what is kept and what is new
            longer = tape.new(
                after.name, (joins, *after.shape), after.itemsize, moved=(both,), kernel="cat"
            )
            tape.free(longer, before, made)  # one of them is what is kept
            tape.new(after.name, after.shape, after.itemsize, into=after)
        kept = (*left.shape, left.itemsize)
        tape.new(left.name, left.shape, left.itemsize, into=left, moved=(kept,), kernel="clone")
        tape.free(newest)
        alone = Symbol(
            f"(T < S and {self.quantised.name} == 0)", lambda d: LATER.of(d) * (1 - some.of(d))
        )
        return read, tape.new(f"newest {name}", (alone, B, S, *rows), b)

    def _rows(self, tokens: Symbol) -> Rows:
        if self.rule == "window":
            leading: Shape = (B, self.G, tokens)
            return Rows(leading=leading, groups=(self.D // self.g,), g=self.g, form=self.form)
        groups = Symbol(f"({tokens.name} // {self.g})", lambda d: tokens.of(d) // self.g)
        return Rows(leading=(B, self.G, self.D), groups=(groups,), g=self.g, form=self.form)

    def _stored(self, tokens: Symbol) -> list[Buffer]:
        """Codes, scales, zero points and the residual of so many tokens."""
        rows = self._rows(self._quantised(tokens))
        shapes = [
            ("codes", rows.bytes, CODE),
            ("scales", rows.scales, self.b),
            ("zero points", rows.scales, self.b),
            ("residual", (B, self.G, self._residual(tokens), self.D), self.b),
        ]
        return [
            Buffer(name=f"{self.name}, {part}", shape=shape, itemsize=item, cache=True)
            for part, shape, item in shapes
        ]

    def _residual(self, tokens: Symbol) -> Symbol:
        R = self.R
        if self.rule == "window":
            return Symbol(
                f"min({tokens.name}, {R})", lambda d: tokens.of(d) - self._old_values(tokens, d)
            )
        return Symbol(f"({tokens.name} % {R})", lambda d: tokens.of(d) % R)

    def _quantised(self, tokens: Symbol) -> Symbol:
        R = self.R
        if self.rule == "window":
            return Symbol(f"max({tokens.name} - {R}, 0)", lambda d: self._old_values(tokens, d))
        return Symbol(f"({tokens.name} // {R} * {R})", lambda d: tokens.of(d) // R * R)

    def _aged(self) -> Symbol:
        """Tokens that become codes: of values one for each that comes, of keys R now and then."""
        if self.rule == "window":
            return _difference(self._quantised(S), self.quantised)
        R, new, old = self.R, self._quantised(S), self.quantised
        return Symbol(
            f"(({new.name} - {old.name}) * (S // {R} > P // {R}))",
            lambda d: new.of(d) - old.of(d),
        )

    def _old_values(self, tokens: Symbol, d: Dims) -> Number:
        return maximum(tokens.of(d) - self.R, 0)


def _sum(a: Symbol, b: Symbol) -> Symbol:
    return Symbol(f"({a.name} + {b.name})", lambda d: a.of(d) + b.of(d))


def _difference(a: Symbol, b: Symbol) -> Symbol:
    return Symbol(f"({a.name} - {b.name})", lambda d: a.of(d) - b.of(d))
