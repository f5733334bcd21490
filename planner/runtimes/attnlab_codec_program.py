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


def encode(tape: Tape, rows: Rows, *, b: int, name: str) -> tuple[Buffer, ...]:
    """encode(): codes, scales and, where the format has them, zero points of what is new."""
    form, made, held = rows.form, rows.elements, []
    assert form.scales is not None
    new, loop = ((*made, b),), _mixed(b)
    if form.scales.zero_dtype is None:
        scales = tape.new(f"{name}, scales", rows.scales, FLOAT32, moved=new, kernel="amax")
        _scaled(tape, rows)
        beside = [scales]
        wide = tape.new(
            f"{name}, scaled", made, FLOAT32, reads=(scales,), moved=new, kernel="div", loop=loop
        )
    else:  # in the dtype of the computation
        zero = tape.new(f"{name}, zero points", rows.scales, b, moved=new, kernel="amin")
        highest = tape.new("highest", rows.scales, b)
        casts = _casts(tape, rows, b, 2)
        span = tape.new("span", rows.scales, FLOAT32, reads=(highest, zero))
        tape.free(*casts)
        _scaled(tape, rows)
        scales = span
        if b != FLOAT32:
            scales = tape.new(f"{name}, scales", rows.scales, b, reads=(span,))
            tape.free(span)
        beside, held = [scales, zero], [highest]
        casts = _casts(tape, rows, b, 1)
        wide = tape.new(f"{name}, scaled", made, FLOAT32, moved=new, kernel="sub", loop=loop)
        tape.free(*casts)
        casts = _casts(tape, rows, b, 1)
        in_place(tape, f"{name}, scaled", made, FLOAT32, kernel="div_", loop="strided")
        tape.free(*casts)
    steps = ["clamp_"] if form.floating else ["round_", "clamp_"]
    steps += ["add_"] * (form.bits < 8 and form.scales.zero_dtype is None)
    for kernel in steps:
        in_place(tape, f"{name}, scaled", made, FLOAT32, kernel=kernel)
    codes = tape.new(
        f"{name}, codes", made, CODE, reads=(wide,), kernel="_to_copy", loop="strided cast"
    )
    tape.free(wide)
    if form.bits < 8 or rows.is_short:
        filled = tape.new("filled words", rows.filled, CODE) if rows.is_short else None
        packed = filled
        if form.bits < 8:
            for _ in range(1, 8 // form.bits):
                in_place(tape, "shifted codes", rows.bytes, CODE, kernel="shift_", loop="strided")
            packed = tape.new(f"{name}, codes", rows.bytes, CODE, reads=(codes,), kernel="sum")
            tape.free(filled)
        assert packed is not None
        tape.free(codes)
        codes = packed
    tape.free(*held)
    return (codes, *beside)


def in_place(
    tape: Tape, name: str, shape: Shape, itemsize: int, *, kernel: str, loop: str = "whole"
) -> None:
    """An elementwise op on what is there: each element read and written."""
    each = (*shape, itemsize)
    tape.run(name, moved=(each, each), kernel=kernel, loop=loop)


def _mixed(b: int) -> str:
    """How a kernel goes over elements of `b` bytes and a float32 for each group of them."""
    return "strided" if b == FLOAT32 else "strided cast"


def _scaled(tape: Tape, rows: Rows) -> None:
    """_scales(): the largest by a number, then held within what a float can be."""
    for kernel in ("div_", "clamp_"):
        in_place(tape, "scales", rows.scales, FLOAT32, kernel=kernel)


def _casts(tape: Tape, rows: Rows, b: int, count: int) -> list[Buffer]:
    """Scales or zero points in float32, where they are not."""
    if b == FLOAT32:
        return []
    stored = (*rows.scales, b)
    return [
        tape.new("cast", rows.scales, FLOAT32, moved=(stored,), kernel="_to_copy")
        for _ in range(count)
    ]


def decode(tape: Tape, rows: Rows, *, b: int, name: str, whole: bool) -> Buffer:
    """decode(): what is held, in the dtype of the computation.

    `whole`: codes lie one behind the other, with no slots between them that are not read. What is
    packed is taken apart by a shift for each place of a byte and masked; a scale, which all of a
    group share, is another float: kernels that take an offset and a conversion for each element.
    """
    form, codes = rows.form, None
    assert form.scales is not None
    stored: tuple[Shape, Shape] = ((*rows.bytes, CODE), (*rows.scales, FLOAT32))
    if form.bits < 8:
        codes = tape.new(f"{name}, codes", rows.filled, CODE, kernel="empty")
        for _ in range(8 // form.bits):
            in_place(tape, f"{name}, codes", rows.bytes, CODE, kernel="shift", loop="strided")
        in_place(tape, f"{name}, codes", rows.filled, CODE, kernel="bitwise_and_")
        whole = True
        if form.packed == "group" and rows.is_short:
            cut = tape.new(f"{name}, codes", rows.elements, CODE, reads=(codes,), loop="strided")
            tape.free(codes)
            codes = cut
    elif rows.is_short:
        codes = tape.new(f"{name}, codes", rows.elements, CODE, moved=stored[:1], loop="strided")
    apart = ((*rows.elements, CODE),) if codes is not None else stored[:1]
    loop = "cast" if whole else "strided cast"
    x = tape.new(name, rows.elements, b, moved=apart, kernel="_to_copy", loop=loop)
    tape.free(codes)
    each = (*rows.elements, b)
    if form.scales.zero_dtype is not None:
        beside = (2, *rows.scales, b)
        tape.run(name, moved=(each, each, beside), kernel="addcmul", loop="strided")
        return x
    if form.bits < 8:
        in_place(tape, name, rows.elements, b, kernel="sub_")
    tape.run(name, moved=(each, each, stored[1]), kernel="mul_", loop=_mixed(b))
    return x
