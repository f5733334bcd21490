"""QuantizedCache.update as ops: what dequantising, joining and quantising allocate.

Written beside cache_utils.py of transformers 5.23 and optimum-quanto 0.2.7 (tensor/grouped.py,
packed.py, qbits.py, optimizers/max_optimizer.py, library/quantize.py); unpacking is one kernel. Of
hqq only codes and scales are known (0.2.8): what it allocates meanwhile is taken from quanto.

Shapes.  B batch · H heads · d width · T tokens of this pass · P before it · S after it
         r tokens in the residual before this pass · n groups of g elements
"""

from __future__ import annotations

from planner.kv_formats import KvFormat, TensorFormat, cached_tensors
from planner.layers import GQA, MLA
from planner.program import PAST, B, Buffer, Dims, Extent, Number, S, Shape, Symbol, T, Tape
from planner.runtimes.writer import FLOAT32

SCRATCH, DEQUANTISED, JOINED = (
    "quantisation scratch",
    "dequantised keys, values",
    "joined keys, values",
)


class QuantisedLayer:
    """The cache of one kind of layer, before and after a pass; `append` is its update()."""

    def __init__(
        self,
        tape: Tape,
        form: KvFormat,
        attention: GQA | MLA,
        *,
        itemsize: int,
        residual_tokens: int,
    ) -> None:
        shapes = cached_tensors(attention)
        self._keys, self._values = (
            _Tensor(tape, tensor, heads, width, itemsize, residual_tokens)
            for tensor, (heads, width) in zip((form.keys, form.values), shapes, strict=True)
        )

    def open(self) -> None:
        """What it holds of the passes before."""
        self._keys.open()
        self._values.open()

    def prefill(
        self, k: Buffer, v: Buffer, *, copies: tuple[Extent, Extent]
    ) -> tuple[Buffer, Buffer]:
        """Quantise everything; attention gets what was computed.

        `copies`: 1 where the tensor is not contiguous and copied first, else 0.
        """
        for tensor, x, copied in ((self._keys, k, copies[0]), (self._values, v, copies[1])):
            tensor.store(x, copied)
        return k, v

    def decode(self, k: Buffer, v: Buffer) -> tuple[Buffer, Buffer]:
        """Attention gets all that was cached, dequantised, and the new token."""
        keys, values = self._keys, self._values
        if keys.appendable:
            added = (keys.encode(k, T), values.encode(v, T))
            keys.extend(added[0])
            values.extend(added[1])
            joined = (keys.decoded(), values.decoded())
            keys.drop(added[0])
            values.drop(added[1])
            return joined
        whole = (keys.dequantise(), values.dequantise())
        joined = (keys.join(whole[0], k), values.join(whole[1], v))
        if keys.is_full:
            keys.requantise(joined[0])
            values.requantise(joined[1])
            keys.empty_residual()
            values.empty_residual()
        else:
            keys.keep(k)
            values.keep(v)
        keys.tape.free(*whole)
        return joined


class _Tensor:
    """Keys or values of one layer in a format, and the ops on them."""

    def __init__(
        self,
        tape: Tape,
        form: TensorFormat,
        heads: int,
        width: int,
        itemsize: int,
        residual_tokens: int,
    ) -> None:
        self.tape, self.form, self.b = tape, form, itemsize
        self.heads, self.width, self.r = heads, width, residual_tokens
        r = residual_tokens
        past = PAST if r == 0 else Symbol(f"(P − {r})", lambda d: d.context - d.tokens - r)
        self.quantised: Symbol = past
        self.old = self._stored(past)
        self.new = self._stored(S)
        self.old_residual = self._residual(r)
        self.new_residual = self._residual(r + 1)

    @property
    def appendable(self) -> bool:
        """Whether new tokens are quantised alone, by the scale of the first (fp8)."""
        return self.form.residual is None

    @property
    def is_full(self) -> bool:
        """Whether the token of this pass fills the residual."""
        assert self.form.residual is not None
        return self.r + 1 >= self.form.residual.tokens

    def open(self) -> None:
        """Allocate what the passes before have left."""
        for buffer in (*self.old, *((self.old_residual,) if self.r else ())):
            self.tape.new(buffer.name, buffer.shape, buffer.itemsize, into=buffer)

    def store(self, x: Buffer, copied: Extent) -> None:
        """Quantise a whole prompt, of a contiguous copy where it is not."""
        copy = None
        if copied and not self.appendable:
            copy = self._scratch((copied, *self._shape(T)), self.b, x)
        self._quantise(x, T)
        self.tape.free(copy)

    def requantise(self, x: Buffer) -> None:
        """Quantise everything anew; what was kept goes when that is done."""
        self._quantise(x, S)
        self.tape.free(*self.old)

    def dequantise(self) -> Buffer:
        """QBitsTensor.dequantize: unpack, scale, shift, and turn back groups along channels."""
        shape = self._shape(self.quantised)
        unpacked = (self.form.codes_per_word, *self.old[0].shape)  # what fills up words included
        codes = self._scratch(unpacked, 1, self.old[0])
        out = self.tape.new(DEQUANTISED, shape, self.b, reads=(codes, *self.old[1:]))
        if self._along_channels:
            turned = self.tape.new(DEQUANTISED, shape, self.b, reads=(out,))
            self.tape.free(codes, out)
            return turned
        self.tape.free(codes)
        return out

    def join(self, whole: Buffer, new: Buffer) -> Buffer:
        """torch.cat of what was dequantised, the residual and the new token."""
        residual = (self.old_residual,) if self.r else ()
        return self.tape.new(JOINED, self._shape(S), self.b, reads=(whole, *residual, new))

    def keep(self, new: Buffer) -> None:
        """torch.cat of the residual and the new token."""
        out, old = self.new_residual, (self.old_residual,) if self.r else ()
        self.tape.new(out.name, out.shape, out.itemsize, reads=(*old, new), into=out)
        self.tape.free(*old)

    def empty_residual(self) -> None:
        """Everything is quantised now."""
        self.tape.free(self.old_residual if self.r else None)

    # -- fp8 -----------------------------------------------------------------------------------

    def encode(self, x: Buffer, tokens: Symbol, *, into: Buffer | None = None) -> Buffer:
        """(x.float() / scale).to(float8)."""
        shape = self._shape(tokens)
        wide = x if self.b == FLOAT32 else self._scratch(shape, FLOAT32, x)
        scaled = self._scratch(shape, FLOAT32, wide)
        self.tape.free(*((wide,) if wide is not x else ()))
        codes = self.tape.new(SCRATCH, shape, 1, reads=(scaled,), into=into)
        self.tape.free(scaled)
        return codes

    def extend(self, added: Buffer) -> None:
        """torch.cat of the old codes and the new; update() still holds both."""
        out = self.new[0]
        self.tape.new(out.name, out.shape, out.itemsize, reads=(self.old[0], added), into=out)

    def decoded(self) -> Buffer:
        """(codes.float() · scale).to(dtype)."""
        shape = self._shape(S)
        wide = self._scratch(shape, FLOAT32, self.new[0])
        if self.b == FLOAT32:
            out = self.tape.new(DEQUANTISED, shape, self.b, reads=(wide,))
            self.tape.free(wide)
            return out
        scaled = self._scratch(shape, FLOAT32, wide)
        self.tape.free(wide)
        out = self.tape.new(DEQUANTISED, shape, self.b, reads=(scaled,))
        self.tape.free(scaled)
        return out

    def drop(self, added: Buffer) -> None:
        """What update() held until it returned."""
        self.tape.free(self.old[0], added)

    # -- quantising ----------------------------------------------------------------------------

    def _quantise(self, x: Buffer, tokens: Symbol) -> None:
        """Codes, scales and shifts of x, which stay; in the order of the source."""
        tape, b, numbers = self.tape, self.b, self._shape(tokens)
        if self.appendable:
            absolute = self._scratch(numbers, b, x)
            largest = self._scratch((1,), b, absolute)
            tape.free(absolute, largest)
            scale = self.new[1]
            tape.new(scale.name, scale.shape, scale.itemsize, into=scale)
            self.encode(x, tokens, into=self.new[0])
            return
        codes, scale, shift = self.new
        grouped = self._scratch(numbers, b, x) if self._along_channels else x
        extremes = [self._scratch(scale.shape, b, grouped) for _ in ("least", "most")]
        difference = self._scratch(scale.shape, b)
        tape.new(scale.name, scale.shape, b, into=scale)
        tape.free(difference)
        tape.new(shift.name, shift.shape, b, into=shift)
        tape.free(*extremes)
        if self._along_channels:
            tape.free(grouped)
            grouped = self._scratch(numbers, b, x)
        shifted = self._scratch(numbers, b, grouped)
        scaled = self._scratch(numbers, b, shifted)
        tape.free(shifted)
        rounded = self._scratch(numbers, b, scaled)
        tape.free(scaled)
        clamped = self._scratch(numbers, b, rounded)
        narrow = self._scratch(numbers, 1, clamped)
        tape.free(rounded, clamped, *((grouped,) if self._along_channels else ()))
        tape.new(codes.name, codes.shape, codes.itemsize, into=codes)
        word = self._scratch(codes.shape, codes.itemsize, narrow)
        tape.free(word, narrow)

    def _scratch(self, shape: Shape, itemsize: int, *reads: Buffer) -> Buffer:
        return self.tape.new(SCRATCH, shape, itemsize, reads=reads)

    @property
    def _along_channels(self) -> bool:
        return self.form.packed == "group"

    # -- sizes ---------------------------------------------------------------------------------

    def _shape(self, tokens: Symbol) -> Shape:
        return (B, self.heads, tokens, self.width)

    def _residual(self, tokens: int) -> Buffer:
        shape = (B, self.heads, tokens, self.width)
        return Buffer(name="residual", shape=shape, itemsize=self.b, cache=True)

    def _stored(self, tokens: Symbol) -> tuple[Buffer, ...]:
        """Codes and scales, and shifts where the format has them."""
        scales = self.form.scales
        assert scales is not None
        if self.appendable:
            return (
                Buffer(name="codes", shape=self._shape(tokens), itemsize=1, cache=True),
                Buffer(name="scale", shape=(1,), itemsize=FLOAT32, cache=True),
            )
        groups, g = self._groups(tokens), scales.group_size
        text = groups.name
        if scales.lone_per_element:
            text = f"({text} + ({text} == 1) · {(g or 1) - 1})"
        count = Symbol(text, lambda d: scales.count(groups.of(d)))
        return (
            Buffer(name="codes", shape=(self._packed(tokens),), itemsize=1, cache=True),
            Buffer(name="scales", shape=(count,), itemsize=self.b, cache=True),
            Buffer(name="shifts", shape=(count,), itemsize=self.b, cache=True),
        )

    def _packed(self, tokens: Symbol) -> Symbol:
        """Bytes of codes in whole words."""
        groups, form = self._groups(tokens), self.form
        assert form.scales is not None
        g, codes = form.scales.group_size, form.codes_per_word
        text = f"ceil({groups.name} / {codes}) · {g}"
        if form.packed == "group":
            text = f"{groups.name} · ceil({g} / {codes})"
        if form.word_bytes > 1:
            text = f"{text} · {form.word_bytes}"
        return Symbol(text, lambda d: form.packed_bytes(groups.of(d)))

    def _groups(self, tokens: Symbol) -> Symbol:
        assert self.form.scales is not None
        g, each = self.form.scales.group_size, self.heads * self.width
        assert g is not None

        def groups(d: Dims) -> Number:
            return d.batch * each * tokens.of(d) // g

        return Symbol(f"B · {each} · {tokens.name} / {g}", groups)
