"""One pass of a model as a list of ops: what each computes, moves, allocates and frees.

From this one list come both the activation peak (`activations.py`: liveness) and the time
(`roofline.py`). A program is built once for a (model, runtime, attention, dtypes); its sizes are
products of numbers and symbols of `Dims`, evaluated on Python ints (exact) or on float64 arrays
(exact below 2⁵³), so that a grid of batches and contexts is one evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from planner.routing import UNIFORM, Routing

Number: TypeAlias = Any
"""A Python int, or a float64 array of them."""
FORWARD, BACKWARD, OPTIMIZER_STEP = "forward", "backward", "optimizer step"
"""Phases of a training step."""
ADDED = ", added backward"
"""How the name ends of a gradient's sum with those of earlier batches, on autograd's thread."""
ENCODED = "end of the encoder"
"""How the segment behind an encoder is called, and the end of its name on the way back."""
OPENING = "cache of "
"""How the segments are labelled that make what a pass finds: caches, filled or preallocated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dims:
    """Batch, tokens of this pass, and tokens of context after it (cached ones included).

    `capacity` is what a preallocated cache has room for; None: exactly the context. `encoder`: what
    a sequence-to-sequence model's encoder reads; None: as many as the tokens. `routing`: how they
    are dealt out to experts, which decides what is read and nothing that is allocated.
    """

    batch: Number
    tokens: Number
    context: Number
    capacity: Number | None = None
    encoder: Number | None = None
    routing: Routing = UNIFORM

    @property
    def is_point(self) -> bool:
        """Whether these are numbers, not arrays of them."""
        sizes = (self.batch, self.tokens, self.context, self.capacity, self.encoder)
        return not any(isinstance(size, np.ndarray) for size in sizes)


@dataclass(frozen=True, slots=True)
class Symbol:
    """A size that depends on Dims, named by its expression. One name, one size."""

    name: str
    of: Callable[[Dims], Number]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Symbol) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


class Reached(Symbol):
    """How many experts of a mixture the tokens of a pass reach (routing.py)."""

    __slots__ = ("experts", "top_k")

    experts: int
    top_k: int

    def __init__(self, experts: int, top_k: int) -> None:
        Symbol.__init__(
            self,
            f"reached({experts}, {top_k}, B · T)",
            lambda d: d.routing.reached(experts, top_k, d.batch * d.tokens),
        )
        object.__setattr__(self, "experts", experts)
        object.__setattr__(self, "top_k", top_k)


Extent: TypeAlias = int | Symbol
Shape: TypeAlias = tuple[Extent, ...]

B = Symbol("B", lambda d: d.batch)
T = Symbol("T", lambda d: d.tokens)
S = Symbol("S", lambda d: d.context)
PAST = Symbol("P", lambda d: d.context - d.tokens)
C = Symbol("C", lambda d: d.context if d.capacity is None else d.capacity)
S_ENC = Symbol("S_enc", lambda d: d.tokens if d.encoder is None else d.encoder)
SEVERAL_BATCHES = Symbol("(B > 1)", lambda d: (d.batch > 1) * 1)
SEVERAL_TOKENS = Symbol("(T > 1)", lambda d: (d.tokens > 1) * 1)
FOLDED = Symbol("(B > 1) · (T > 1)", lambda d: (d.batch > 1) * 1 * (d.tokens > 1))
"""1 where [B, T, H, D] seen as [B, H, T, D] cannot be folded to [B·H, T, D] without a copy."""


LATENT = "latent_attention"
"""The kernel of attention over latents, whose prompts and steps differ (MLA)."""


def minimum(a: Number, b: Number) -> Number:
    """min() that keeps Python ints exact and takes arrays too."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.minimum(a, b)
    return min(a, b)


def maximum(a: Number, b: Number) -> Number:
    """max() that keeps Python ints exact and takes arrays too."""
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.maximum(a, b)
    return max(a, b)


def visible_pairs(window: int | None) -> Symbol:
    """Query–key pairs that a causal (windowed) mask lets through, for one head of one sequence.

    Query i of T stands at position S − T + i and sees min(position + 1, W) keys.
    """
    if window is None:
        return Symbol("pairs", lambda d: d.tokens * (d.context - d.tokens) + _triangle(d.tokens))
    W = window

    def pairs(d: Dims) -> Number:
        past = d.context - d.tokens
        rising = minimum(maximum(W - past, 0), d.tokens)  # queries that still see all before them
        return rising * past + _triangle(rising) + (d.tokens - rising) * W

    return Symbol(f"pairs_{W}", pairs)


EVERY = "pairs of "


def every_pair(queries: Extent, keys: Extent) -> Symbol:
    """Query–key pairs where nothing is hidden: an encoder's, those of cross-attention."""
    shape = (queries, keys)
    return Symbol(f"{EVERY}{formula(shape)}", lambda d: evaluate(shape, d))


def _triangle(n: Number) -> Number:
    return n * (n + 1) // 2


def evaluate(shape: Shape, dims: Dims) -> Number:
    """The product of a shape's extents: elements, bytes or FLOPs, whatever the shape counts."""
    product: Number = 1
    for extent in shape:
        product = product * (extent if isinstance(extent, int) else extent.of(dims))
    return product


def formula(shape: Shape) -> str:
    """A shape as text, "B · T · 4096"; a symbol's name is an expression of B, T, S, P, C."""
    return " · ".join(str(e) if isinstance(e, int) else e.name for e in shape) or "1"


def symbols(dims: Dims) -> dict[str, int]:
    """The numbers that a formula's letters stand for at one point."""
    letters = (B, T, S, PAST, C, S_ENC)
    return {letter.name: letter.of(dims) for letter in letters}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Buffer:
    """A storage that the pass allocates: what it is called, its elements, bytes of one.

    `gradient`: a parameter's, which outlives the backward pass. `lasting`: made once, and
    found by all passes that follow (an encoder's states, the cache of cross-attention). `stream`:
    which of the device's it is made on, 0 the default one.
    """

    name: str
    shape: Shape
    itemsize: int
    cache: bool = False
    gradient: bool = False
    lasting: bool = False
    stream: int = 0

    def nbytes(self, dims: Dims) -> Number:
        """Bytes of the storage."""
        return self.itemsize * evaluate(self.shape, dims)


LOOPS = ("", "whole", "strided", "cast", "strided cast", "across", "far", "joined", "down")
"""What torch's elementwise kernels do on a GPU (ATen/native/cuda/CUDALoops.cuh, gpu_kernel_impl):
vectors of whole tensors; an offset for each element, where an operand is repeated or lies in
another order; a conversion for each, where dtypes differ; both. Across, far: offsets, and an
operand whose neighbours are no neighbours in what is written (autograd/layouts.py: reach). Joined:
a cat that goes element by element; down: a sum along another than the innermost dimension. Empty:
not said.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Op:
    """One operation. It allocates first, computes, then frees; products of shapes are its sizes.

    `kernel`: the op of torch that runs, where the program says so. `loop`: how an elementwise one
    goes over its operands, where that is known (LOOPS).
    """

    name: str
    allocates: tuple[Buffer, ...] = ()
    frees: tuple[Buffer, ...] = ()
    flops: Shape | None = None
    reads: tuple[Buffer, ...] = ()
    weight_bytes: int = 0
    moved: tuple[Shape, ...] = ()  # bytes moved beyond whole buffers, such as rows of a table
    kernel: str = ""
    loop: str = ""

    @property
    def sometimes(self) -> bool:
        """Whether what it makes, or works on in place, is there under a condition only: a factor
        that is 1 or 0.
        """
        made = [buffer.shape for buffer in self.allocates] or self.moved
        extents = (e for shape in made for e in shape if isinstance(e, Symbol))
        return any(sign in e.name for e in extents for sign in ("<", ">", "=="))


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Ops that run `count` times in a row, once for each of as many equal layers.

    `first_layer` is the one of the first repetition; `layer_step` −1: it goes down from there.
    `phase` names the part of the pass, where it has several.
    """

    label: str
    ops: tuple[Op, ...]
    count: int = 1
    first_layer: int | None = None
    layer_step: int = 1
    phase: str = ""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Program:
    """The segments of one pass in order, and the buffers that live on after it."""

    name: str
    segments: tuple[Segment, ...]

    def repeating(self, counts: Mapping[str, int]) -> Program:
        """The same with the segments of these labels so many times; 0: without them."""
        segments = (replace(s, count=counts.get(s.label, s.count)) for s in self.segments)
        return Program(name=self.name, segments=tuple(s for s in segments if s.count))


class Tape:
    """Writes a program down as a forward pass is walked through, line by line."""

    def __init__(self) -> None:
        self._segments: list[Segment] = []
        self._by_label: dict[str, Segment] = {}
        self._ops: list[Op] = []
        self._written: Segment | None = None  # what is being written, without its ops
        self.phase = ""

    def new(
        self,
        op: str,
        shape: Shape,
        itemsize: int,
        *,
        flops: Shape | None = None,
        reads: tuple[Buffer, ...] = (),
        weight_bytes: int = 0,
        moved: tuple[Shape, ...] = (),
        scratch: tuple[tuple[Shape, int], ...] = (),
        cache: bool = False,
        into: Buffer | None = None,
        called: str = "",
        kernel: str = "",
        loop: str = "",
    ) -> Buffer:
        """An op with one output; `scratch` are further outputs that are dropped at once.

        `into` gives the output an identity that another segment also allocates or frees, `called`
        a name that is not the op's.
        """
        out = into or Buffer(name=called or op, shape=shape, itemsize=itemsize, cache=cache)
        extra = tuple(Buffer(name=f"{op} (scratch)", shape=s, itemsize=i) for s, i in scratch)
        self._ops.append(
            Op(
                name=op,
                allocates=(out, *extra),
                frees=extra[::-1],
                flops=flops,
                reads=reads,
                weight_bytes=weight_bytes,
                moved=moved,
                kernel=kernel,
                loop=loop,
            )
        )
        return out

    def run(
        self,
        op: str,
        *,
        moved: tuple[Shape, ...],
        kernel: str,
        loop: str = "",
        flops: Shape | None = None,
    ) -> None:
        """An op that works in place: it allocates nothing."""
        self._ops.append(Op(name=op, moved=moved, kernel=kernel, loop=loop, flops=flops))

    def replace(self, old: Buffer, new: Buffer) -> None:
        """Describe a buffer of the segment that is being written anew."""

        def renamed(buffers: tuple[Buffer, ...]) -> tuple[Buffer, ...]:
            return tuple(new if b is old else b for b in buffers)

        self._ops = [
            replace(op, allocates=renamed(op.allocates), frees=renamed(op.frees))
            if old in op.allocates or old in op.frees
            else op
            for op in self._ops
        ]

    def free(self, *buffers: Buffer | None) -> None:
        """The last references to these go; None is passed over."""
        gone = tuple(b for b in buffers if b is not None)
        if gone:
            self._ops.append(Op(name="free", frees=gone))

    @contextmanager
    def segment(
        self, label: str, *, count: int = 1, first_layer: int | None = None, layer_step: int = 1
    ) -> Iterator[None]:
        """What is written inside becomes one segment."""
        assert not self._ops, "segments do not nest"
        self._written = Segment(
            label=label, ops=(), count=count, first_layer=first_layer, layer_step=layer_step
        )
        yield
        self._end(self._written)

    @contextmanager
    def apart(self, label: str) -> Iterator[None]:
        """What is written inside stands between two parts of the segment that is being written."""
        around = self._written
        assert around is not None
        assert around.count == 1, "a part of what repeats does not repeat by itself"
        self._end(around)
        yield
        self._end(replace(around, label=label))

    def _end(self, written: Segment) -> None:
        ops, self._ops = tuple(self._ops), []
        written = replace(written, ops=ops, phase=self.phase)
        self._by_label[written.label] = written
        self._segments.append(written)

    def again(self, label: str, *, count: int, first_layer: int | None) -> bool:
        """Repeat the segment that carries this label; False if there is none yet."""
        if label not in self._by_label:
            return False
        again = replace(self._by_label[label], count=count, first_layer=first_layer)
        self._segments.append(again)
        return True

    def open_with(
        self, label: str, buffers: tuple[Buffer, ...], *, count: int, first_layer: int | None
    ) -> None:
        """Say of buffers that they were there before all that is written."""
        found = Op(name=label, allocates=buffers)
        segment = Segment(
            label=label, ops=(found,), count=count, first_layer=first_layer, phase=label
        )
        self._segments.insert(0, segment)

    def program(self, name: str) -> Program:
        """What was written so far."""
        assert not self._ops, "ops outside a segment"
        return Program(name=name, segments=tuple(self._segments))
