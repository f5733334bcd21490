"""What an op of a program is, for the clock: which family times it, and by which sizes.

Read off the op itself (its FLOPs, its output, what it moves), so that one program serves memory and
time. Everything is an expression of `Dims` still; the same kind serves a point and a grid.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.program import (
    EVERY,
    LATENT,
    OPENING,
    Dims,
    Extent,
    Number,
    Op,
    Program,
    Reached,
    Segment,
    Shape,
    Symbol,
    evaluate,
)
from planner.timing.op_families import (
    ACROSS,
    CUMSUM_DOWN,
    FAR,
    JOINED,
    STRIDED,
    STRIDED_CAST,
)

ROTARY = re.compile(r"rotary|rotated|turned|negated|· cos|· sin")
NORM = re.compile(r"norm")
MEAN = re.compile(r"mean|sum\b|amax|amin|max\.dim|vector_norm|norm\(\)")
"""Each row to a number, read once."""
SOFTMAX = re.compile(r"_(?:safe_)?softmax")
"""Over rows of attention or routing; over a vocabulary it is a logarithm, a REDUCTION."""
REDUCTION = re.compile(r"softmax|nll|logsumexp|var|cross_entropy")
GATHER = re.compile(r"embedding|index|gather|scatter|topk|sort")
ROUTING = ("sort", "topk")
"""Several kernels, and latencies: they do not stream."""
NO_KERNEL = re.compile(r"^(empty|new_empty|scalar_tensor)")
SEVERAL_OUTPUTS = re.compile(r"native_layer_norm|nll_loss|topk|sort")
ONE_KERNEL_NORMS = re.compile(r"native_layer_norm|rms_norm|fused")
APART = ("cat", "optimizer")
APART_KERNELS = re.compile(r"topk|scatter")
"""Kinds, and kernels, that a compiler leaves as they are; rows that are picked by an index are
loads of the op that wants them (torch/_inductor/lowering.py: index, gather, embedding), and up to
512 numbers are sorted inside a kernel (torch/_inductor/ir.py: Sort)."""
ATTENTION = "_scaled_dot_product"
COLLECTIVES = ("all_gather", "reduce_scatter")
"""Kernels that a communicator runs beside a pass's own (collectives.py)."""
MASKED = 4
"""Inputs of fused attention: queries, keys, values, mask."""


@dataclass(frozen=True, slots=True)
class Product:
    """y[m, n] over k; `free` is the size that batch and tokens decide: 0, m, or 2, k.

    `wide`: of float32, whatever the model computes in otherwise: what
    prepare_model_for_kbit_training left so, adapters.
    """

    m: Shape
    n: Shape
    flops: Shape
    free: int
    head: bool
    wide: bool = False

    def sizes(self, dims: Dims) -> tuple[Number, Number, Number]:
        """m, n, k."""
        m, n = evaluate(self.m, dims), evaluate(self.n, dims)
        return m, n, evaluate(self.flops, dims) / (2.0 * np.maximum(m * n, 1))


@dataclass(frozen=True, slots=True)
class Grouped:
    """Rows dealt out to experts: m rows, of those that are reached, each n × k."""

    m: Shape
    reached: Reached
    n: int
    k: int


@dataclass(frozen=True, slots=True)
class Attention:
    """Fused attention of H heads over G, D wide; `pairs` of query and key a head of a sequence."""

    heads: int
    kv_heads: int
    head_dim: float
    kv_bytes: int
    pairs: Symbol
    backward: bool
    keys: Extent | None = None
    """With a mask of its own a kernel computes all T × keys, seen or not; None: causal."""
    backend: str = ""
    held: Extent | None = None
    """Keys of a cache that the kernel is given whole, a window's or not; None: those it sees."""
    when: Extent | None = None
    """1 where there is that mask, 0 where there is none; None: wherever `keys` are said."""

    def masked(self, dims: Dims) -> Number:
        """Whether a mask of its own is given."""
        if self.keys is None or self.when is None:
            return self.keys is not None
        return np.asarray(evaluate((self.when,), dims)) > 0

    def pairs_of(self, dims: Dims) -> Number:
        """Pairs that are computed."""
        if self.keys is None or self.pairs.name.startswith(EVERY):
            return self.pairs.of(dims)
        every = dims.tokens * evaluate((self.keys,), dims)
        if self.when is None:
            return every
        return np.where(self.masked(dims), every, self.pairs.of(dims))


@dataclass(frozen=True, slots=True)
class Batched:
    """Products of many small matrices; m, n and k are there where its operands tell them."""

    flops: Shape
    dtype_bytes: int
    mnk: tuple[Shape, ...] = ()

    def sizes(self, dims: Dims) -> tuple[Number, Number, Number, Number]:
        """Pairs of matrices, m, n, k."""
        m, n, k = (evaluate(shape, dims) for shape in self.mnk)
        return evaluate(self.flops, dims) / (2.0 * m * n * k), m, n, k

    @property
    def is_fixed(self) -> bool:
        """Whether batch and tokens decide nothing but how many pairs there are."""
        return all(map(_is_fixed, self.mnk))


WALKS = {
    "whole": "elementwise",
    "cast": "cast",
    "strided": STRIDED,
    "strided cast": STRIDED_CAST,
    "across": ACROSS,
    "far": FAR,
    "joined": JOINED,
    "down": CUMSUM_DOWN,
}
"""A program's word for how a kernel goes over its operands → its kind."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """An op that moves bytes; `launched`: a kernel runs even where there are next to none."""

    kind: str
    launched: bool


@dataclass(frozen=True, slots=True)
class Nothing:
    """No kernel: frees, views, further outputs of the op before."""


Kind = Product | Grouped | Attention | Batched | Bytes | Nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """An op, what it is, and how often it runs in a pass (equal ops of equal layers together)."""

    op: Op
    kind: Kind
    count: int


@lru_cache(maxsize=512)
def timed_ops(program: Program, *, fused: bool = False) -> tuple[Timed, ...]:
    """The ops of a pass; those of the same sizes are one, with their count.

    `fused`: of ops that only move bytes, one after the other, one kernel is made, as a compiler
    does: it costs what the largest of them moves.
    """
    counts: dict[object, int] = {}
    first: dict[object, tuple[Op, Kind]] = {}
    walked: dict[int, list[tuple[object, Op, Kind]]] = {}
    for segment in program.segments:
        ops = segment.ops
        if is_there(segment):
            continue
        if id(ops) not in walked:
            before: tuple[Op | None, ...] = (None, *ops)
            kinds: list[tuple[Op, Kind]] = [
                (op, Nothing() if _further_output(op, last) else kind_of(op))
                for last, op in zip(before, ops, strict=False)
            ]
            kept = [pair for pair in kinds if not isinstance(pair[1], Nothing)]
            made = list(_chains(kept)) if fused else kept
            walked[id(ops)] = [(_alike(op, kind), op, kind) for op, kind in made]
        for key, op, kind in walked[id(ops)]:
            counts[key] = counts.get(key, 0) + segment.count
            first.setdefault(key, (op, kind))
    return tuple(Timed(op=op, kind=kind, count=counts[key]) for key, (op, kind) in first.items())


@lru_cache(maxsize=512)
def kernel_count(program: Program) -> int:
    """Kernels that a pass launches, one an op."""
    return sum(timed.count for timed in timed_ops(program) if not timed.op.sometimes)


def is_there(segment: Segment) -> bool:
    """Whether a segment only says what the pass finds: nothing of it runs."""
    return segment.label.startswith(OPENING)


def _further_output(op: Op, before: Op | None) -> bool:
    """Statistics of a norm, indices of a sort: outputs of the kernel that has just run."""
    if before is None or op.kernel != before.kernel or not SEVERAL_OUTPUTS.match(op.kernel):
        return False
    return not (op.reads or op.moved or op.weight_bytes or op.flops)


SAMPLE = Dims(batch=3, tokens=17, context=1009)
"""Sizes at which the largest op of a chain is picked: cells of a grid must not differ in it."""


def _chains(ops: list[tuple[Op, Kind]]) -> Iterator[tuple[Op, Kind]]:
    """Runs of ops that move bytes, each as its largest one."""
    run: list[tuple[Op, Kind]] = []
    for op, kind in ops:
        if isinstance(kind, Bytes) and not _stands_apart(op, kind):
            run.append((op, kind))
            continue
        if run:
            yield _largest(run)
            run = []
        yield op, kind
    if run:
        yield _largest(run)


def _stands_apart(op: Op, kind: Bytes) -> bool:
    return kind.kind in APART or bool(APART_KERNELS.match(op.kernel))


def _largest(run: list[tuple[Op, Kind]]) -> tuple[Op, Kind]:
    op, _ = max(run, key=lambda pair: moved_bytes(pair[0], SAMPLE))
    return op, Bytes("elementwise", True)


def moved_bytes(op: Op, dims: Dims) -> Number:
    """Bytes an op reads and writes: its inputs, its weights, its outputs; nothing that only frees.

    A preallocated or inherited cache is not written by being there.
    """
    if not (op.reads or op.weight_bytes or op.moved or op.flops):
        return 0
    total: Number = op.weight_bytes
    for buffer in (*op.reads, *op.allocates):
        total = total + buffer.nbytes(dims)
    for shape in op.moved:
        total = total + evaluate(shape, dims)
    return total


def elements(op: Op, dims: Dims) -> Number:
    """Of what an op makes, or of the first tensor that one in place touches."""
    return evaluate(op.allocates[0].shape if op.allocates else op.moved[0][:-1], dims)


def _alike(op: Op, kind: Kind) -> object:
    """Equal for ops that take the same time whatever the sizes, the host's too."""
    shapes = tuple((b.shape, b.itemsize) for b in (*op.reads, *op.allocates))
    return kind, op.kernel, shapes, op.moved, op.weight_bytes, op.flops


def kind_of(op: Op) -> Kind:
    """What an op is."""
    if op.flops is not None:
        return _computing(op)
    if NO_KERNEL.match(op.kernel) or op.kernel.startswith((ATTENTION, *COLLECTIVES)):
        return Nothing()
    moves = bool(op.reads or op.weight_bytes or op.moved)
    if not moves and not op.kernel:
        return Nothing()
    return Bytes(kind=_byte_kind(op), launched=bool(op.kernel) or moves)


def _computing(op: Op) -> Kind:
    assert op.flops is not None
    pairs = next(
        (e for e in op.flops if isinstance(e, Symbol) and e.name.startswith("pairs")), None
    )
    itemsize = op.allocates[0].itemsize if op.allocates else 2
    if pairs is not None:
        found = _attention(op, pairs)
        return Batched(op.flops, itemsize) if found is None else found
    if op.kernel == "_grouped_mm" or op.name.startswith("experts "):
        found_group = _grouped(op)
        return Batched(op.flops, itemsize) if found_group is None else found_group
    if op.kernel == "bmm" and op.allocates:
        return Batched(op.flops, itemsize, _mnk(op))
    packed = any(len(shape) == 1 for shape in op.moved)  # codes, so many bytes
    unpacked = op.kernel == "gemm_4bit" and not packed  # of a weight that was made before
    if not (op.kernel in ("", "mm", "addmm") or unpacked) or not op.allocates:
        return Batched(op.flops, itemsize)
    return _product(op)


def _mnk(op: Op) -> tuple[Shape, ...]:
    """m, n and k: what of pairs · m · n · k the right factor, the left one and the result lack."""
    assert op.flops is not None
    if len(op.moved) != 2:
        return ()
    left, right = (shape[:-1] for shape in op.moved)
    found = tuple(_without(op.flops[1:], shape) for shape in (right, left, op.allocates[0].shape))
    return tuple(shape for shape in found if shape is not None) if None not in found else ()


def _without(shape: Shape, part: Shape) -> Shape | None:
    """The extents of a product that another one lacks; None where it is no part of it."""
    left = list(shape)
    for extent in part:
        if extent == 1 and 1 not in left:
            continue
        if extent not in left:
            return None
        left.remove(extent)
    return tuple(left)


def _product(op: Op) -> Kind:
    """Rows × [n, k], or the gradient of a weight: [n, k] over the rows."""
    assert op.flops is not None
    out = op.allocates[0].shape
    rows, last = out[:-1], out[-1:]
    if not _is_fixed(last):
        return Batched(op.flops, op.allocates[0].itemsize)
    free = 2 if _is_fixed(rows) and not _is_fixed(op.flops) else 0
    head, wide = op.name.startswith("logits"), op.allocates[0].itemsize == 4 and _reads_wide(op)
    return Product(m=rows, n=last, flops=op.flops, free=free, head=head, wide=wide)


def _reads_wide(op: Op) -> bool:
    """Whether all that a training step's product reads is float32: (…, itemsize)."""
    return bool(op.kernel and op.moved) and all(shape[-1] == 4 for shape in op.moved)


def _is_fixed(shape: Shape) -> bool:
    return all(isinstance(e, int) for e in shape)


def _grouped(op: Op) -> Grouped | None:
    assert op.flops is not None
    reached = next((s[0] for s in op.moved if isinstance(s[0], Reached)), None)
    *rows, a, b = op.flops[1:]
    if reached is None or not isinstance(a, int) or not isinstance(b, int):
        return None
    out = op.allocates[0].shape[-1]
    n, k = (a, b) if out in (a, 0) or out not in (a, b) else (b, a)
    return Grouped(m=tuple(rows), reached=reached, n=n, k=k)


def _attention(op: Op, pairs: Symbol) -> Attention | None:
    """(2, B, H, widths of keys and values, pairs), or (4·D, B, H, pairs); backward 10·… ."""
    assert op.flops is not None
    first, *rest = op.flops
    numbers = [e for e in rest if isinstance(e, int) and e != 1]
    backward = first == 10
    if op.kernel and not op.kernel.startswith((ATTENTION, LATENT)):
        return None
    if op.name.startswith("scores"):
        return None
    if first in (2, 10) and len(numbers) == 2:
        H, D = numbers[0], numbers[1] / (1 if backward else 2)
    elif isinstance(first, int) and first % 2 == 0 and len(numbers) <= 1:
        H, D = (numbers[0] if numbers else 1), first / 4
    else:
        return None
    keys = _keys(op)
    if keys is None:
        return Attention(H, H, D, 2, pairs, backward, None, _backend(op))
    every, when = _masked_keys(op, backward=backward), None
    if table := _table(op):
        when, every = table
    G, b = keys
    return Attention(H, min(H, G), D, b, pairs, backward, every, _backend(op), _held(op), when)


def _held(op: Op) -> Extent | None:
    """(2, B, G, S, D, itemsize), keys and values in one: S."""
    return next((s[3] for s in op.moved if len(s) == 6 and s[0] == 2), None)


def _table(op: Op) -> tuple[Extent, Extent] | None:
    """A mask beside keys and values in one, (1 where there is one, T, keys, itemsize): that, and
    its keys.
    """
    table = next((s for s in op.moved[1:] if len(s) == 4), None)
    return None if table is None or _held(op) is None else (table[0], table[2])


def _masked_keys(op: Op, *, backward: bool) -> Extent | None:
    """How many keys a mask is over, [B, heads, T, S]: the last thing that a kernel is given.

    On the way back it is one of many, told from keys and values by its width.
    """
    if not op.kernel.startswith(ATTENTION) or not op.moved:
        return None
    if not backward:
        return op.moved[1][2] if len(op.moved) == MASKED else None
    last = op.moved[-1]
    return last[3] if len(last) == 5 and not isinstance(last[3], int) else None


def _backend(op: Op) -> str:
    """The kernel that the program names: cudnn, flash, efficient, or over latents; empty where it
    does not.
    """
    if op.kernel == LATENT:
        return LATENT
    found = re.match(rf"{ATTENTION}_(cudnn|flash|efficient)_attention", op.kernel)
    return found.group(1) if found and not op.kernel.endswith("_for_cpu") else ""


def _keys(op: Op) -> tuple[int, int] | None:
    """Key-value heads and bytes of an element, from what is read: the fewest heads of all.

    (B, heads, T, D, itemsize) each, or (2, B, G, S, D, itemsize) keys and values in one; a latent,
    (B, S, width, itemsize), is one head's.
    """
    for shape in op.moved:
        if len(shape) == 6 and shape[0] == 2 and isinstance(shape[2], int):
            return shape[2], _fixed(shape[-1])
        if len(op.moved) == 1 and len(shape) == 4:
            return 1, _fixed(shape[-1])
    tensors = [s for s in op.moved if len(s) == 5 and isinstance(s[1], int) and s[1] > 0]
    held = [s for s in tensors if isinstance(s[3], int)]
    if not held:
        return None
    return min(_fixed(s[1]) for s in held), _fixed(held[0][-1])


def _fixed(extent: Extent) -> int:
    assert isinstance(extent, int)
    return extent


def _byte_kind(op: Op) -> str:
    name, kernel = op.name, op.kernel
    if kernel.startswith("_fused_adamw"):
        return "optimizer"
    if kernel.split(".")[0] in ROUTING:
        return kernel.split(".")[0]
    if GATHER.search(kernel) or (not kernel and "embedding" in name):
        return "gather"
    if op.loop:
        return WALKS[op.loop]
    if kernel in ("convolution", "cumsum"):
        return kernel
    if kernel.startswith(("cat", "constant_pad")) and not ROTARY.search(name):
        return "cat"
    if ROTARY.search(name):
        return STRIDED
    if SOFTMAX.match(kernel) or (not kernel and "softmax" in name):
        return "softmax"
    if REDUCTION.search(kernel):
        return "reduction"
    if MEAN.search(kernel):
        return "mean"
    if kernel == "_to_copy" or name.startswith("float32") or _widens(op):
        return "cast"
    return "norm" if ONE_KERNEL_NORMS.search(kernel) else "elementwise"


def converts(op: Op) -> bool:
    """x.to(dtype), either way."""
    if op.kernel:
        return op.kernel == "_to_copy"
    if op.moved or op.weight_bytes or len(op.reads) != 1:
        return False
    return [b.itemsize for b in op.allocates] not in ([], [op.reads[0].itemsize])


def _widens(op: Op) -> bool:
    """A tensor of two bytes made one of four, nothing else: x.float()."""
    if op.kernel or op.moved or op.weight_bytes or len(op.reads) != 1:
        return False
    (read,) = op.reads
    return [b.itemsize for b in op.allocates] == [4] and read.itemsize == 2
