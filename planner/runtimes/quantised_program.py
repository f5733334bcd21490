"""QuantizedCache.update as ops: what dequantising, joining and quantising allocate.

Written beside cache_utils.py of transformers 5.23; what its backends do is in
`quantised_backends.py`.

Shapes.  B batch · H heads · d width · T tokens of this pass · P before it · S after it
         r tokens in the residual before this pass
"""

from __future__ import annotations

from typing import TypeAlias

from planner.kv_formats import cached_tensors
from planner.layers import GQA, MLA
from planner.program import B, Buffer, Extent, S, T, Tape
from planner.runtimes.quantised_backends import Fp8Tensor, HqqTensor, QuantoTensor
from planner.runtimes.quantised_cache import Backend, QuantisedCache

JOINED = "joined keys, values"

Stored: TypeAlias = Fp8Tensor | HqqTensor | QuantoTensor
KINDS: dict[Backend, type[Stored]] = {"fp8": Fp8Tensor, "hqq": HqqTensor, "quanto": QuantoTensor}


class QuantisedLayer:
    """The cache of one kind of layer, before and after a pass; the last two are its update().

    `on_cpu`: hqq searches in float32 there, in float16 on a GPU.
    """

    def __init__(
        self,
        tape: Tape,
        cache: QuantisedCache,
        attention: GQA | MLA,
        *,
        itemsize: int,
        residual_tokens: int,
        on_cpu: bool,
    ) -> None:
        self.tape, self.b, self.r = tape, itemsize, residual_tokens
        self.shapes = cached_tensors(attention)
        self.full = residual_tokens + 1 >= cache.form.residual_tokens
        forms = (cache.form.keys, cache.form.values)
        self.tensors: list[Stored] = []
        for form, (heads, width) in zip(forms, self.shapes, strict=True):
            kind = KINDS[cache.backend]
            self.tensors.append(
                kind(tape, form, heads, width, itemsize, residual_tokens, on_cpu=on_cpu)
            )
        self.old_residual = [self._residual(i, residual_tokens) for i in (0, 1)]
        self.new_residual = [self._residual(i, residual_tokens + 1) for i in (0, 1)]

    def open(self) -> None:
        """What it holds of the passes before."""
        residual = self.old_residual if self.r else []
        for buffer in (*self.tensors[0].old, *self.tensors[1].old, *residual):
            self.tape.new(buffer.name, buffer.shape, buffer.itemsize, into=buffer)

    def prefill(
        self, k: Buffer, v: Buffer, *, copies: tuple[Extent, Extent]
    ) -> tuple[Buffer, Buffer]:
        """Quantise everything; attention gets what was computed.

        `copies`: 1 where the tensor is not contiguous and is copied first, else 0.
        """
        for tensor, x, copied in zip(self.tensors, (k, v), copies, strict=True):
            copy = None
            if copied and not isinstance(tensor, Fp8Tensor):
                copy = self.tape.new("contiguous copy", (copied, *tensor.shape(T)), self.b)
            tensor.quantise(copy or x, T)
            self.tape.free(copy)
        return k, v

    def decode(self, k: Buffer, v: Buffer) -> tuple[Buffer, Buffer]:
        """Attention gets all that was cached, dequantised, and the new token."""
        tape, new = self.tape, (k, v)
        appended = [t for t in self.tensors if isinstance(t, Fp8Tensor)]
        if appended:
            added = [t.encode(x, T) for t, x in zip(appended, new, strict=True)]
            for kept, codes in zip(appended, added, strict=True):
                kept.extend(codes)
            keys, values = (t.dequantise() for t in appended)
            tape.free(*(t.old[0] for t in appended), *added)
            return keys, values
        whole = [t.dequantise() for t in self.tensors if not isinstance(t, Fp8Tensor)]
        keys, values = (self._join(i, whole[i], new[i]) for i in (0, 1))
        if self.full:
            for tensor, joined in zip(self.tensors, (keys, values), strict=True):
                tensor.quantise(joined, S)
                tape.free(*tensor.old)
        else:
            for old, out, x in zip(self.old_residual, self.new_residual, new, strict=True):
                tape.new(out.name, out.shape, out.itemsize, reads=(old, x), into=out)
                tape.free(old if self.r else None)
        if self.full and self.r:
            tape.free(*self.old_residual)
        tape.free(*whole)
        return keys, values

    def _join(self, which: int, whole: Buffer, new: Buffer) -> Buffer:
        """torch.cat of what was dequantised, the residual and the new token."""
        residual = (self.old_residual[which],) if self.r else ()
        shape = self.tensors[which].shape(S)
        return self.tape.new(JOINED, shape, self.b, reads=(whole, *residual, new))

    def _residual(self, which: int, tokens: int) -> Buffer:
        heads, width = self.shapes[which]
        return Buffer(name="residual", shape=(B, heads, tokens, width), itemsize=self.b, cache=True)
