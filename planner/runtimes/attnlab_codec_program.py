"""Encoding and decoding of attnlab's quantised caches, op by op: kernels/attnlab/quantize.py.

Scales are found and divide in float32, in one wide copy of what is new; codes are read into a
tensor of the model's dtype, scaled in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.kv_formats import TensorFormat
from planner.program import Buffer, Extent, Shape, Tape
from planner.runtimes.writer import FLOAT32

CODE = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """A tensor to quantise: rows of `width` elements, `leading` of them, in groups of `g`.

    `groups` of a row and, behind them, what is left of a shape in which rows are not of one width:
    KIVI's keys are rows of tokens.
    """

    leading: Shape
    groups: tuple[Extent, ...]
    g: int
    form: TensorFormat

    @property
    def elements(self) -> Shape:
        """All elements, or codes one by one."""
        return (*self.leading, *self.groups, self.g)

    @property
    def scales(self) -> Shape:
        """One for each group."""
        return (*self.leading, *self.groups)

    @property
    def words(self) -> int:
        """Codes of what is packed together that fill whole words: of a group, or of a row."""
        codes, packed = self.form.codes_per_word, self._packed
        return -(-packed // codes) * codes

    @property
    def filled(self) -> Shape:
        """Codes one by one, words filled up."""
        return (*self.leading, *self._outside, self.words)

    @property
    def bytes(self) -> Shape:
        """Packed codes."""
        return (*self.leading, *self._outside, self.words * self.form.bits // 8)

    @property
    def is_short(self) -> bool:
        """Whether words are filled up."""
        return self.words != self._packed

    @property
    def _packed(self) -> int:
        if self.form.packed == "group":
            return self.g
        (n,) = self.groups
        assert isinstance(n, int)
        return n * self.g

    @property
    def _outside(self) -> tuple[Extent, ...]:
        return self.groups if self.form.packed == "group" else ()


def encode(tape: Tape, rows: Rows, x: Buffer, *, b: int, name: str) -> tuple[Buffer, ...]:
    """encode(): codes, scales and, where the format has them, zero points of what is new."""
    form, made, held = rows.form, rows.elements, []
    assert form.scales is not None
    if form.scales.zero_dtype is None:
        scales = tape.new(f"{name}, scales", rows.scales, FLOAT32, reads=(x,), kernel="amax")
        beside = [scales]
        wide = tape.new(f"{name}, scaled", made, FLOAT32, reads=(x, scales))
    else:  # in the dtype of the computation
        zero = tape.new(f"{name}, zero points", rows.scales, b, reads=(x,), kernel="amin")
        highest = tape.new("highest", rows.scales, b)
        casts = _casts(tape, rows, b, 2)
        span = tape.new("span", rows.scales, FLOAT32, reads=(highest, zero))
        tape.free(*casts)
        scales = span
        if b != FLOAT32:
            scales = tape.new(f"{name}, scales", rows.scales, b, reads=(span,))
            tape.free(span)
        beside, held = [scales, zero], [highest]
        casts = _casts(tape, rows, b, 1)
        wide = tape.new(f"{name}, scaled", made, FLOAT32, reads=(x,))
        tape.free(*casts)
        casts = _casts(tape, rows, b, 1)
        tape.free(*casts)
    codes = tape.new(f"{name}, codes", made, CODE, reads=(wide,), kernel="_to_copy")
    tape.free(wide)
    if form.bits < 8 or rows.is_short:
        filled = tape.new("filled words", rows.filled, CODE) if rows.is_short else None
        packed = filled
        if form.bits < 8:
            packed = tape.new(f"{name}, codes", rows.bytes, CODE, reads=(codes,), kernel="sum")
            tape.free(filled)
        assert packed is not None
        tape.free(codes)
        codes = packed
    tape.free(*held)
    return (codes, *beside)


def _casts(tape: Tape, rows: Rows, b: int, count: int) -> list[Buffer]:
    """Scales or zero points in float32, where they are not."""
    if b == FLOAT32:
        return []
    return [tape.new("cast", rows.scales, FLOAT32) for _ in range(count)]


def decode(tape: Tape, rows: Rows, *, b: int, name: str) -> Buffer:
    """decode(): what is held, in the dtype of the computation."""
    form, codes = rows.form, None
    assert form.scales is not None
    stored: tuple[Shape, Shape] = ((*rows.bytes, CODE), (*rows.scales, FLOAT32))
    if form.bits < 8:
        codes = tape.new(f"{name}, codes", rows.filled, CODE, moved=stored[:1])
        if form.packed == "group" and rows.is_short:
            cut = tape.new(f"{name}, codes", rows.elements, CODE, reads=(codes,))
            tape.free(codes)
            codes = cut
    elif rows.is_short:
        codes = tape.new(f"{name}, codes", rows.elements, CODE, moved=stored[:1])
    x = tape.new(name, rows.elements, b, moved=stored[:1], kernel="_to_copy")
    tape.free(codes)
    read = 1 if form.scales.zero_dtype is None else 2
    tape.run(name, moved=((2, *rows.elements, b), (read, *stored[1])), kernel="mul_")
    return x
