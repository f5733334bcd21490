"""torch.autocast: products take 16 bits whatever they are given, some ops take float32.

ATen/autocast_mode.h and .cpp of torch 2.13. Arguments are cast last one first (C++ leaves the order
open; GCC takes that one). The cast of a float32 leaf that wants a gradient is cached, a parameter
or embeddings that are asked for one: it lives until the region ends, whatever becomes of what it
was made for. Ops of neither list take the widest of their operands' dtypes, as outside. On a CPU
the float32 list is short, and nothing here is in it but the loss; a GPU's has softmax, powers,
roots, sums and LayerNorm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from planner.autograd.recording import Recorder, only
from planner.autograd.tensors import Gradients, Leaf, Node, Tensor

FLOAT32 = 4


def widens(device: str) -> bool:
    """Whether autocast there has the long float32 list: softmax, powers, sums, LayerNorm."""
    return device != "cpu"


class Autocast(Recorder):
    """Casts, those that the code asks for and those of a region of autocast.

    `low`: bytes of an element that products take in the region; None: there is none. `widens`:
    whether the device has the long float32 list.
    """

    low: int | None = None
    widens = False
    casts: dict[Leaf | Node, Tensor]
    """Of leaves, cached until the region ends."""

    def cast(self, x: Tensor, itemsize: int, name: str = "") -> Tensor:
        """x.to(dtype), x itself where it is of that dtype; the gradient is cast back."""
        if x.itemsize == itemsize:
            return x

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            return [self.aten.cast(only(flowed), like.itemsize, f"gradient of {like.name}")]

        return self._record(backward, (x,), self.aten.cast(x, itemsize, name or x.name))

    def lowered(self, x: Tensor) -> Tensor:
        """An argument of a product, in 16 bits inside a region."""
        if self.low is None or x.itemsize != FLOAT32:
            return x
        if x.node is None or not x.node.is_leaf or x.is_view:
            return self.cast(x, self.low, f"{x.name}, cast")
        if x.node not in self.casts:
            self.casts[x.node] = self.cast(x, self.low, f"{x.name}, cast")
        return self.casts[x.node]

    def widened(self, x: Tensor) -> Tensor:
        """An argument of an op on the float32 list."""
        if self.low is None or not self.widens:
            return x
        return self.cast(x, FLOAT32, f"{x.name}, float32")

    def promoted(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is joined, in the widest of its dtypes: cat is on a CPU's list, not on a GPU's."""
        if self.low is None or self.widens:
            return parts
        widest = max(x.itemsize for x in parts)
        return [self.cast(x, widest) for x in parts]

    @contextmanager
    def outside_autocast(self) -> Iterator[None]:
        """Inside an op of torch, which autocast has cast the arguments of already."""
        low, self.low = self.low, None
        yield
        self.low = low
