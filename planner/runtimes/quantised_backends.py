"""What the backends of a QuantizedCache allocate to quantise and to dequantise a tensor.

quanto: optimum-quanto 0.2.7, tensor/grouped.py, packed.py, qbits.py, library/quantize.py (unpacking
is one kernel). hqq: hqq 0.2.8, core/quantize.py, optimize.py. fp8: transformers, cache_utils.py.

Shapes.  B batch · H heads · d width · T tokens of this pass · P before it · S after it
         n groups of g elements
"""

from __future__ import annotations

from planner.kv_formats import TensorFormat
from planner.program import PAST, B, Buffer, Dims, Number, S, Shape, Symbol, Tape
from planner.runtimes.writer import FLOAT32

SCRATCH, DEQUANTISED = "quantisation scratch", "dequantised keys, values"
FLOAT16 = 2


class _Tensor:
    """Keys or values of one layer in a format: what is kept before and after a pass."""

    def __init__(
        self,
        tape: Tape,
        form: TensorFormat,
        heads: int,
        width: int,
        itemsize: int,
        residual_tokens: int,
        *,
        on_cpu: bool,
    ) -> None:
        self.tape, self.form, self.b = tape, form, itemsize
        self.on_cpu = on_cpu
        self.heads, self.width, r = heads, width, residual_tokens
        past = PAST if r == 0 else Symbol(f"(P − {r})", lambda d: d.context - d.tokens - r)
        self.quantised: Symbol = past
        self.old = self.stored(past)
        self.new = self.stored(S)

    def shape(self, tokens: Symbol) -> Shape:
        """[B, H, tokens, d]."""
        return (B, self.heads, tokens, self.width)

    def scratch(self, shape: Shape, itemsize: int, *reads: Buffer, loop: str = "") -> Buffer:
        """A tensor that quantising or dequantising drops again."""
        return self.tape.new(SCRATCH, shape, itemsize, reads=reads, loop=loop)

    def keep(self, buffer: Buffer) -> None:
        """Allocate one of the tensors that stay."""
        self.tape.new(buffer.name, buffer.shape, buffer.itemsize, into=buffer)

    def stored(self, tokens: Symbol) -> tuple[Buffer, ...]:
        """Packed codes, a scale and a zero point for each group."""
        form, scales = self.form, self.form.scales
        assert scales is not None
        groups, g, codes = self._groups(tokens), scales.group_size, form.codes_per_word
        count, packed = groups.name, f"ceil({groups.name} / {codes}) · {g}"
        if form.packed == "group":
            packed = f"{groups.name} · ceil({g} / {codes})"
        if scales.lone_per_element:
            count = f"({count} + ({count} == 1) · {(g or 1) - 1})"
        words = Symbol(packed, lambda d: form.packed_bytes(groups.of(d)) // form.word_bytes)
        numbers = Symbol(count, lambda d: scales.count(groups.of(d)))
        return (
            Buffer(name="codes", shape=(words,), itemsize=form.word_bytes, cache=True),
            Buffer(name="scales", shape=(numbers,), itemsize=self.b, cache=True),
            Buffer(name="zero points", shape=(numbers,), itemsize=self.b, cache=True),
        )

    def _groups(self, tokens: Symbol) -> Symbol:
        assert self.form.scales is not None
        g, each = self.form.scales.group_size, self.heads * self.width
        assert g is not None

        def groups(d: Dims) -> Number:
            return d.batch * each * tokens.of(d) // g

        return Symbol(f"B · {each} · {tokens.name} / {g}", groups)


class QuantoTensor(_Tensor):
    """MaxOptimizer and quantize_affine; groups along channels are turned by a copy."""

    def quantise(self, x: Buffer, tokens: Symbol) -> None:
        """Codes, scales and shifts of x; the rest goes."""
        tape, b, numbers = self.tape, self.b, self.shape(tokens)
        codes, scale, shift = self.new
        turned = self.scratch(numbers, b, x) if self._along_channels else None
        extremes = [self.scratch(scale.shape, b, turned or x) for _ in ("least", "most")]
        difference = self.scratch(scale.shape, b)
        self.keep(scale)
        tape.free(difference)
        self.keep(shift)
        tape.free(*extremes, turned)
        turned = self.scratch(numbers, b, x) if self._along_channels else None
        step = self.scratch(numbers, b, turned or x)
        for _ in ("/ scale", "round"):
            before, step = step, self.scratch(numbers, b, step)
            tape.free(before)
        clamped = self.scratch(numbers, b, step)
        narrow = self.scratch(numbers, 1, clamped)
        tape.free(step, clamped, turned)
        self.keep(codes)
        shifted = self.scratch(codes.shape, codes.itemsize, narrow)
        tape.free(shifted, narrow)

    def dequantise(self) -> Buffer:
        """QBitsTensor.dequantize: unpack, times scale, minus shift in place."""
        shape = self.shape(self.quantised)
        unpacked = (self.form.codes_per_word, *self.old[0].shape)  # what fills words up included
        codes = self.scratch(unpacked, 1, self.old[0])
        out = self.tape.new(DEQUANTISED, shape, self.b, reads=(codes, *self.old[1:]))
        turned = out
        if self._along_channels:
            turned = self.tape.new(DEQUANTISED, shape, self.b, reads=(out,))
        self.tape.free(codes, *((out,) if turned is not out else ()))
        return turned

    @property
    def _along_channels(self) -> bool:
        return self.form.packed == "group"


class HqqTensor(_Tensor):
    """A search for zero points, in float32 on a CPU, in float16 on a GPU, that stops early."""

    def quantise(self, x: Buffer, tokens: Symbol) -> None:
        """optimize_weights_proximal_legacy in its second round: what it and its callers hold."""
        tape, numbers, count = self.tape, self.shape(tokens), self.new[1].shape
        e = FLOAT32 if self.on_cpu else FLOAT16
        held: list[Buffer] = []
        if self.b != FLOAT32:
            held.append(self.scratch(numbers, FLOAT32, x))
        held += [self.scratch(count, FLOAT32) for _ in ("least", "most", "difference")]
        held += [self.scratch(count, FLOAT32) for _ in ("scale", "zero")]
        if e != FLOAT32:
            held.append(self.scratch(numbers, e, x))
            held += [self.scratch(count, e) for _ in ("scale", "zero")]
        held += [self.scratch((1,), FLOAT32), self.scratch(count, e)]  # least error, better zero
        last_round = [self.scratch(numbers, e, x) for _ in ("codes", "restored")]
        this_round = [self.scratch(numbers, e, x) for _ in ("codes", "restored", "difference")]
        shrunk = [self.scratch(numbers, e, this_round[-1]) for _ in ("|x|", "power", "scaled")]
        tape.free(*last_round, *this_round, *shrunk)
        for buffer in self.new:
            self.keep(buffer)
        tape.free(*held)

    def dequantise(self) -> Buffer:
        """(unpacked − zero) · scale, unpacked into the dtype of the model."""
        shape = self.shape(self.quantised)
        words = (self.form.codes_per_word, *self.old[0].shape)
        unpacked = self.scratch(words, self.b, self.old[0])
        less = self.scratch(shape, self.b, unpacked)
        out = self.tape.new(DEQUANTISED, shape, self.b, reads=(less, *self.old[1:]))
        self.tape.free(less, unpacked)
        return out


class Fp8Tensor(_Tensor):
    """float8_e4m3fn by the scale of the first update, which new codes are appended under.

    One scale for all elements is a tensor without dimensions, which a kernel reads again for each.
    """

    def stored(self, tokens: Symbol) -> tuple[Buffer, ...]:
        """Codes, and one scale."""
        return (
            Buffer(name="codes", shape=self.shape(tokens), itemsize=1, cache=True),
            Buffer(name="scale", shape=(1,), itemsize=FLOAT32, cache=True, lasting=True),
        )

    def quantise(self, x: Buffer, tokens: Symbol) -> None:
        """The largest |x|, then the codes."""
        absolute = self.scratch(self.shape(tokens), self.b, x)
        largest = self.scratch((1,), self.b, absolute)
        self.tape.free(absolute, largest)
        self.keep(self.new[1])
        self.encode(x, tokens, into=self.new[0])

    def encode(self, x: Buffer, tokens: Symbol, *, into: Buffer | None = None) -> Buffer:
        """(x.float() / scale).to(float8)."""
        shape = self.shape(tokens)
        wide = None if self.b == FLOAT32 else self.scratch(shape, FLOAT32, x)
        scaled = self.scratch(shape, FLOAT32, wide or x, loop="strided")
        self.tape.free(wide)
        codes = self.tape.new(SCRATCH, shape, 1, reads=(scaled,), into=into, loop="whole")
        self.tape.free(scaled)
        return codes

    def extend(self, added: Buffer) -> None:
        """torch.cat of the old codes and the new; update() still holds both."""
        out = self.new[0]
        self.tape.new(out.name, out.shape, out.itemsize, reads=(self.old[0], added), into=out)

    def dequantise(self) -> Buffer:
        """(codes.float() · scale).to(dtype)."""
        shape = self.shape(S)
        wide = self.scratch(shape, FLOAT32, self.new[0], loop="cast")
        if self.b == FLOAT32:
            out = self.tape.new(DEQUANTISED, shape, self.b, reads=(wide,), loop="strided")
            self.tape.free(wide)
            return out
        scaled = self.scratch(shape, FLOAT32, wide, loop="strided")
        self.tape.free(wide)
        out = self.tape.new(DEQUANTISED, shape, self.b, reads=(scaled,))
        self.tape.free(scaled)
        return out
