"""Tensors without contents and the graph that records what they come from.

Lifetimes are CPython's: a storage's bytes go when the last reference to it goes, as in torch. So a
forward written with these as attnlab writes it, `del`s included, frees what that one frees, and
what autograd saves lives as long as the node that saved it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from planner.autograd.layouts import Ints
from planner.program import Buffer, Shape, Tape

Dims: TypeAlias = tuple[Shape, ...]
"""Dimensions, each a product of extents: ((B, T), (4096,)) has B · T rows."""


class Storage:
    """Bytes that live until the last reference goes; without a tape they were there before.

    `index` counts the allocations before it.
    """

    __slots__ = ("buffer", "index", "tape")

    def __init__(self, buffer: Buffer, tape: Tape | None, index: int = -1) -> None:
        self.buffer, self.tape, self.index = buffer, tape, index

    def __del__(self) -> None:
        if self.tape is not None:
            self.tape.free(self.buffer)

    def known_as(self, buffer: Buffer) -> None:
        """Give the bytes another description, in the segment that is being written."""
        if self.tape is not None:
            self.tape.replace(self.buffer, buffer)
        self.buffer = buffer


@dataclass(slots=True, eq=False)
class Tensor:
    """A view of a storage: `sizes` are the numbers that `dims` stand for in the regime at hand.

    `node` is what made it, `output` which of that node's outputs it is; None: no gradient wanted.
    `is_view`: of a tensor that torch keeps for as long.
    """

    storage: Storage
    dims: Dims
    sizes: Ints
    strides: Ints
    itemsize: int
    name: str
    node: Node | Leaf | None = None
    output: int = 0
    is_view: bool = False

    @property
    def shape(self) -> Shape:
        """All extents; their product is the number of elements."""
        return tuple(extent for dim in self.dims for extent in dim)

    def detach(self, name: str = "") -> Tensor:
        """The same view without a history: what is saved for the way back."""
        return Tensor(
            self.storage,
            self.dims,
            self.sizes,
            self.strides,
            self.itemsize,
            name or self.name,
            is_view=self.is_view,
        )

    def seen_as(self, dims: Dims, sizes: Ints, strides: Ints) -> Tensor:
        """Another view of the same storage, without a history yet."""
        return Tensor(self.storage, dims, sizes, strides, self.itemsize, self.name, is_view=True)


@dataclass(frozen=True, slots=True)
class Like:
    """Size, layout, dtype and name of a tensor, without its storage."""

    dims: Dims
    sizes: Ints
    strides: Ints
    itemsize: int
    name: str


Gradients: TypeAlias = list[Tensor | None]
Backward: TypeAlias = Callable[["Node", Gradients], Gradients]


class Node:
    """What remains of an op for the way back: where its inputs come from, and what it saved.

    `backward` makes the inputs' gradients of its `outputs` outputs' (None: nothing flowed there);
    `wants` says for each input whether anything needs its gradient. `unpack` gives what was saved
    where it has to be computed again. `is_leaf`: nothing made the tensor, though it is no
    parameter.
    """

    def __init__(
        self,
        name: str,
        backward: Backward,
        inputs: Sequence[Tensor],
        saved: Sequence[Tensor],
        outputs: int = 1,
    ) -> None:
        self.name, self.backward, self.outputs = name, backward, outputs
        self.edges = [(x.node, x.output) for x in inputs]
        self.wants = [x.node is not None for x in inputs]
        self.inputs = [Like(x.dims, x.sizes, x.strides, x.itemsize, x.name) for x in inputs]
        self.saved = [x.detach() for x in saved]
        self.unpack: Callable[[], list[Tensor]] | None = None
        self.waiting: dict[int, Tensor] = {}
        self.is_leaf = False
        for x in inputs:
            if isinstance(x.node, Leaf):
                x.node.expected += 1


@dataclass(slots=True, eq=False)
class Leaf:
    """A trained tensor: gradients still to come, their sum so far, and the final one.

    `gathered`: it is made of shards, which have gradients of their own; this one is passing.
    """

    tensor: Like
    gathered: bool = False
    expected: int = 0
    waiting: Tensor | None = None
    grad: Tensor | None = None

    @property
    def is_leaf(self) -> bool:
        """Always: nothing makes it."""
        return True
