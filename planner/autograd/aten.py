"""The ops of torch on tensors without contents: what each allocates, and how its result lies.

No history is kept here: these are what forward and backward formulas are made of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from planner.autograd.layouts import (
    Ints,
    channels_last,
    contiguous,
    elementwise,
    is_channels_last,
    is_contiguous,
    is_whole,
    preserved,
    reach,
    view,
)
from planner.autograd.reduction_scratch import column_sum_scratch
from planner.autograd.tensors import Dims, Like, Storage, Tensor
from planner.program import Buffer, Extent, Shape, Symbol, Tape
from planner.program import Dims as Point

ONE: Shape = (1,)
ATTENTION = tuple(
    f"_scaled_dot_product_{which}attention{where}"
    for which, where in (("flash_", ""), ("flash_", "_for_cpu"), ("cudnn_", ""), ("efficient_", ""))
)
KEPT = ("mm", "addmm", "_grouped_mm")
ARITHMETIC = tuple(f"{op}.Tensor" for op in ("add", "sub", "mul", "div"))
"""Elementwise ops whose operands are converted to the result's dtype."""


def is_kept(kernel: str) -> bool:
    """Whether selective checkpointing keeps what this op returns: linear layers, attention."""
    return kernel in KEPT or kernel in ATTENTION


class Sizes(dict[Symbol, int]):
    """The number that stands for each symbol: its value at one point of a regime."""

    def __init__(self, dims: Point) -> None:
        super().__init__()
        self._dims = dims

    def __missing__(self, symbol: Symbol) -> int:
        self[symbol] = value = int(symbol.of(self._dims))
        return value


class Aten:
    """A tape, and the numbers that symbols stand for where only their being 1 or more matters.

    `watched`: ops are seen by a dispatch mode, under which some formulas of torch do out of place
    what they do in place otherwise (ATen/TensorSubclassLikeUtils.h); every measurement of live
    tensors is one.
    """

    def __init__(self, tape: Tape, numbers: Mapping[Symbol, int]) -> None:
        self.tape, self.numbers = tape, numbers
        self._sizes: dict[Dims, Ints] = {}
        self.watched = True
        self.on_gpu = False  # kernels of CUDA allocate scratch that those of a CPU do not
        self.multiprocessors = 0  # of the CUDA device; 0: not known, or none
        self.doing = ""  # the node whose backward runs
        self.made = 0  # allocations so far
        self.last: int | None = None  # from here on nothing is allocated any more
        self.keeps: deque[Tensor] | None = None  # takes what selective checkpointing keeps
        self.taken: deque[Tensor] | None = None  # gives it when a block runs again
        self.keeps_every = 1  # products: the first and each so many-th behind it
        self.products = 0  # of the block so far

    def sizes(self, dims: Dims) -> Ints:
        """Dimensions as numbers of this regime."""
        found = self._sizes.get(dims)
        if found is None:
            found = self._sizes[dims] = tuple(
                prod(e if isinstance(e, int) else self.numbers[e] for e in dim) for dim in dims
            )
        return found

    def new(
        self,
        kernel: str,
        name: str,
        dims: Dims,
        itemsize: int,
        *,
        strides: Ints | None = None,
        reads: Sequence[Tensor] = (),
        flops: Shape | None = None,
        scratch: Sequence[tuple[Shape, int]] = (),
        rows: Sequence[Shape] = (),
        returned: bool = True,
        loop: str = "",
    ) -> Tensor:
        """What an op allocates; `scratch` (shape, itemsize) goes when it ends.

        `rows` are bytes read beyond whole tensors, such as rows of a table. `returned`: the op does
        not let go of it itself.
        """
        sizes = self.sizes(dims)
        laid = contiguous(sizes) if strides is None else strides
        if self.last is not None and self.made >= self.last:
            never = Storage(Buffer(name=name, shape=(0,), itemsize=itemsize), None, self.made)
            return Tensor(never, dims, sizes, laid, itemsize, name)
        kept = returned and is_kept(kernel) and self._is_picked(kernel)
        if kept and self.taken:
            self.made += 1
            return self.taken.popleft()
        moved = tuple((*x.shape, x.itemsize) for x in reads if x.storage.tape is not None)
        moved += tuple(rows)
        weights = (x for x in reads if x.storage.tape is None)
        shape = tuple(extent for dim in dims for extent in dim)
        buffer = self.tape.new(
            self.doing or name,
            shape,
            itemsize,
            flops=flops,
            moved=moved,
            weight_bytes=sum(prod(x.sizes) * x.itemsize for x in weights),
            scratch=tuple(scratch),
            called=name,
            kernel=kernel,
            loop=loop,
        )
        self.made += 1
        storage = Storage(buffer, self.tape, self.made - 1)
        if kept and self.keeps is not None:
            self.keeps.append(Tensor(storage, dims, sizes, laid, itemsize, name))
        return Tensor(storage, dims, sizes, laid, itemsize, name)

    def _is_picked(self, kernel: str) -> bool:
        """Whether this product is one of those that are kept; other ops always are."""
        if kernel != "mm":
            return True
        self.products += 1
        return self.keeps_every == 1 or self.products % self.keeps_every == 1

    def elementwise(
        self, kernel: str, name: str, *operands: Tensor, itemsize: int | None = None
    ) -> Tensor:
        """One element of each operand, repeated where it has one only, makes one of the result."""
        dims, sizes = _broadcast(operands)
        strides = elementwise(sizes, [(x.sizes, x.strides) for x in operands])
        width = itemsize or max(x.itemsize for x in operands)
        converts = kernel in ARITHMETIC and len({x.itemsize for x in operands if x.dims}) > 1
        loop = self._loop(dims, strides, operands, converts=converts)
        return self.new(kernel, name, dims, width, strides=strides, reads=operands, loop=loop)

    def _loop(
        self, dims: Dims, strides: Ints, operands: Sequence[Tensor], *, converts: bool
    ) -> str:
        """How a GPU's kernel goes over operands (program.LOOPS)."""
        whole = is_whole(self.sizes(dims), strides, [(x.sizes, x.strides) for x in operands])
        if converts:
            return "cast" if whole else "strided cast"
        return "whole" if whole else self._reach(dims, strides, operands) or "strided"

    def _reach(self, dims: Dims, strides: Ints, operands: Sequence[Tensor]) -> str:
        told = [(x.sizes, x.strides, x.itemsize) for x in operands if x.dims]
        return reach(self.sizes(dims), strides, told)

    def add_into(self, total: Tensor, x: Tensor) -> None:
        """total += x, in place."""
        moved = tuple((*y.shape, y.itemsize) for y in (total, x, total))
        self.tape.run(self.doing or total.name, moved=moved, kernel="add_.Tensor")

    def in_place(self, kernel: str, name: str, out: Tensor, *operands: Tensor) -> None:
        """An elementwise op, or a copy, that writes `out`, which it reads too where it is named."""
        wide = {x.itemsize for x in (out, *operands) if x.dims}
        loop = self._loop(out.dims, out.strides, (out, *operands), converts=len(wide) > 1)
        moved = tuple((*x.shape, x.itemsize) for x in (*operands, out))
        self.tape.run(self.doing or name, moved=moved, kernel=kernel, loop=loop)

    def add_product(self, out: Tensor, a: Tensor, b: Tensor, name: str) -> None:
        """out.addmm_(a, b): the product is added where `out` lies."""
        moved = tuple((*x.shape, x.itemsize) for x in (out, a, b, out))
        flops = (2, *out.shape, *a.dims[-1])
        self.tape.run(self.doing or name, moved=moved, kernel="addmm_", flops=flops)

    def number(self, name: str, itemsize: int) -> Tensor:
        """A number made a tensor."""
        return self.new("scalar_tensor", name, (), itemsize)

    def put(self, kernel: str, zeros: str, like: Like, name: str) -> Tensor:
        """Values put into a tensor of zeros: in place, out of place where ops are watched."""
        empty = self.new(zeros, name, like.dims, like.itemsize)
        if not self.watched:
            return empty
        return self.new(kernel, name, like.dims, like.itemsize, reads=(empty,))

    def where(self, mask: Tensor, x: Tensor, name: str) -> Tensor:
        """x where the mask lets through, a number elsewhere."""
        number = self.number(name, x.itemsize)
        return self.elementwise("where.self", name, mask, x, number)

    def cast(self, x: Tensor, itemsize: int, name: str) -> Tensor:
        """x.to(dtype): x itself where it is of that dtype.

        What rounds float32 has a kernel that converts nothing on the way (Copy.cu).
        """
        if x.itemsize == itemsize:
            return x
        strides = preserved(x.sizes, x.strides)
        loop = self._loop(x.dims, strides, (x,), converts=(x.itemsize, itemsize) != (4, 2))
        return self.new("_to_copy", name, x.dims, itemsize, strides=strides, reads=(x,), loop=loop)

    def contiguous(self, x: Tensor) -> Tensor:
        """x.contiguous(): x itself where it is row-major."""
        if is_contiguous(x.sizes, x.strides):
            return x
        loop = self._reach(x.dims, contiguous(x.sizes), (x,)) or "strided"
        return self.new("clone", x.name, x.dims, x.itemsize, reads=(x,), loop=loop)

    def as_view(self, x: Tensor, dims: Dims) -> Tensor | None:
        """x.view(dims); None where it cannot be one."""
        sizes = self.sizes(dims)
        strides = view(x.sizes, x.strides, sizes)
        if strides is None:
            return None
        return x.seen_as(dims, sizes, strides)

    def reshape(self, x: Tensor, dims: Dims) -> Tensor:
        """x.reshape(dims): a view where it can be one, else a copy."""
        seen = self.as_view(x, dims)
        if seen is None:
            seen = self.as_view(self.contiguous(x), dims)
        assert seen is not None
        return seen

    def permute(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """x with its dimensions in another order: a view."""
        dims, sizes, strides = x.dims, x.sizes, x.strides
        return x.seen_as(
            tuple([dims[i] for i in order]),
            tuple([sizes[i] for i in order]),
            tuple([strides[i] for i in order]),
        )

    def transpose(self, x: Tensor, a: int, b: int) -> Tensor:
        """x with two dimensions exchanged: a view."""
        order = list(range(len(x.dims)))
        order[a], order[b] = order[b], order[a]
        return self.permute(x, order)

    def narrow(self, x: Tensor, dim: int, length: Extent) -> Tensor:
        """A part of one dimension: a view."""
        dims = list(x.dims)
        dims[dim] = (length,)
        return x.seen_as(tuple(dims), self.sizes(tuple(dims)), x.strides)

    def select(self, x: Tensor, dim: int) -> Tensor:
        """x at one place of a dimension, which goes: a view."""
        at = range(len(x.dims))[dim]

        def without(sequence: tuple[Any, ...]) -> tuple[Any, ...]:
            return sequence[:at] + sequence[at + 1 :]

        return x.seen_as(without(x.dims), without(x.sizes), without(x.strides))

    def unbind(self, x: Tensor, dim: int) -> list[Tensor]:
        """x at each place of a dimension, which goes: views."""
        return [self.select(x, dim) for _ in range(x.sizes[dim])]

    def stack(self, parts: Sequence[Tensor], dim: int, name: str) -> Tensor:
        """Equal parts along a new dimension, counted from behind."""
        like = parts[0]
        at = len(like.dims) + 1 + dim
        dims = (*like.dims[:at], (len(parts),), *like.dims[at:])
        return self.new("stack", name, dims, like.itemsize, reads=parts)

    def as_complex(self, x: Tensor) -> Tensor:
        """view_as_complex of x.reshape(…, -1, 2): pairs of neighbours as one number each."""
        return self._as_numbers(x, 2)

    def as_real(self, x: Tensor) -> Tensor:
        """view_as_real(x).flatten(-2): a complex number as two neighbours."""
        return self._as_numbers(x, 0.5)

    def _as_numbers(self, x: Tensor, joined: float) -> Tensor:
        """A view whose elements are so many of x's."""
        (width,) = x.dims[-1]
        assert isinstance(width, int)
        assert x.strides[-1] == 1
        dims = (*x.dims[:-1], (int(width / joined),))
        strides = (*(int(s / joined) for s in x.strides[:-1]), 1)
        seen = x.seen_as(dims, self.sizes(dims), strides)
        return replace(seen, itemsize=int(x.itemsize * joined))

    def expand(self, x: Tensor, dims: Dims) -> Tensor:
        """x repeated to other sizes, without a copy."""
        sizes = self.sizes(dims)
        lead = len(sizes) - len(x.sizes)
        strides = (0,) * lead + tuple(
            s if n == wanted else 0
            for n, s, wanted in zip(x.sizes, x.strides, sizes[lead:], strict=True)
        )
        return x.seen_as(dims, sizes, strides)

    def cat(
        self,
        parts: Sequence[Tensor],
        dim: int,
        whole: Like | Dims,
        name: str,
        *,
        first: bool = False,
    ) -> Tensor:
        """The parts one behind the other along `dim`, `whole` in all.

        Whole ones are copied in blocks, others element by element (ATen/native/cuda/Shape.cu), and
        so are all behind an empty tensor of no shape, which is what `first` says
        (ATen/native/TensorShape.cpp: all_contiguous).
        """
        dims = whole.dims if isinstance(whole, Like) else whole
        images = all(is_channels_last(x.sizes, x.strides) for x in parts)
        strides = channels_last(self.sizes(dims)) if images else None
        widest = max(x.itemsize for x in parts)
        apart = first or not all(is_contiguous(x.sizes, x.strides) for x in parts)
        loop = "joined" if apart and not images else ""
        return self.new("cat", name, dims, widest, strides=strides, reads=parts, loop=loop)

    def mm(self, a: Tensor, b: Tensor, name: str, *, kernel: str = "mm") -> Tensor:
        """a · b of two matrices, or of as many pairs of them; 2 · m · k · n FLOPs a pair."""
        *pairs, m, k = a.dims
        dims = (*pairs, m, b.dims[-1])
        flops = (2, *(e for dim in (*dims, k) for e in dim))
        return self.new(kernel, name, dims, a.itemsize, flops=flops, reads=(a, b))

    def _sum_scratch(self, x: Tensor, summed: Sequence[int]) -> list[tuple[Shape, int]]:
        """Of a sum over the leading dimensions, on a CUDA device that is known."""
        lead = len(summed)
        if list(summed) != list(range(lead)) or not is_contiguous(x.sizes, x.strides):
            return []
        rows = tuple(extent for dim in x.dims[:lead] for extent in dim)
        return column_sum_scratch(rows, prod(x.sizes[lead:]), self.multiprocessors)

    def sum_to(self, x: Tensor, like: Like, name: str) -> Tensor:
        """The gradient of something that was repeated: summed to its size (at::sum_to)."""
        lead = len(x.sizes) - len(like.sizes)
        repeated = [
            i for i, n in enumerate(x.sizes) if i < lead or (like.sizes[i - lead] == 1 and n != 1)
        ]
        if not repeated:
            return x
        dims = tuple(ONE if i in repeated else dim for i, dim in enumerate(x.dims))
        total = self.new(
            "sum.dim_IntList",
            name,
            dims,
            x.itemsize,
            reads=(x,),
            scratch=self._sum_scratch(x, repeated),
        )
        seen = self.as_view(total, like.dims)
        assert seen is not None
        return seen


def _broadcast(operands: Sequence[Tensor]) -> tuple[Dims, Ints]:
    """Dimensions and sizes of what operands are together: each the first that is not 1."""
    first = operands[0]
    if all(x.sizes == first.sizes for x in operands):
        return first.dims, first.sizes
    rank = max(len(x.dims) for x in operands)
    padded = (
        [(ONE, 1)] * (rank - len(x.dims)) + list(zip(x.dims, x.sizes, strict=True))
        for x in operands
    )
    columns = zip(*padded, strict=True)
    found = [next((part for part in c if part[1] != 1), c[0]) for c in columns]
    return tuple([dim for dim, _ in found]), tuple([size for _, size in found])
