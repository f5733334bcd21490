"""Elements that are picked by number, and sums over dimensions: what routing is made of.

Formulas, saved tensors and order of gradients are those of tools/autograd/derivatives.yaml of
torch 2.13 (see recording.py).
"""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.autocast import Autocast
from planner.autograd.recording import only
from planner.autograd.tensors import Dims, Gradients, Node, Tensor
from planner.program import Shape

INT64 = 8


class Picking(Autocast):
    """Ops that pick, and sums."""

    def index(self, x: Tensor, picks: Tensor, rows: Dims, name: str) -> Tensor:
        """x[picks]: rows of x, as many as `rows` says; the numbers are saved."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            called = f"gradient of {like.name}"
            return [self.aten.put("index_put", "new_zeros", like, called)]

        dims = (*rows, *x.dims[1:])
        moved: Shape = (*(e for dim in dims for e in dim), x.itemsize)
        out = self.aten.new("index.Tensor", name, dims, x.itemsize, rows=(moved,), reads=(picks,))
        return self._record(backward, (x,), out, (picks,))

    def pick(self, x: Tensor, dim: int, name: str) -> Tensor:
        """x[..., [n]] of one dimension, which stays as one: a copy."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            called = f"gradient of {like.name}"
            return [self.aten.put("index_put", "new_zeros", like, called)]

        number = self.aten.new("lift_fresh", "index", (ONE,), INT64)
        dims = (*x.dims[:dim], ONE, *x.dims[dim + 1 :])
        out = self.aten.new("index.Tensor", name, dims, x.itemsize)
        return self._record(backward, (x,), out, (number,))

    def topk(self, x: Tensor, k: int, name: str) -> tuple[Tensor, Tensor]:
        """The k largest of each row, and where they stood, which is saved."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            called = f"gradient of {like.name}"
            return [self.aten.put("scatter.src", "zeros", like, called)]

        dims = (*x.dims[:-1], (k,))
        values = self.aten.new("topk", name, dims, x.itemsize, reads=(x,))
        places = self.aten.new("topk", name, dims, INT64)
        return self._record(backward, (x,), values, (places,)), places

    def gather(self, x: Tensor, picks: Tensor, name: str) -> Tensor:
        """Elements of each row that were picked by number; the numbers are saved."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            called = f"gradient of {like.name}"
            return [self.aten.put("scatter_add", "new_zeros", like, called)]

        moved: Shape = (*picks.shape, x.itemsize)
        out = self.aten.new("gather", name, picks.dims, x.itemsize, rows=(moved,), reads=(picks,))
        return self._record(backward, (x,), out, (picks,))

    def sum(self, x: Tensor, name: str) -> Tensor:
        """Over the last dimension, which stays as one: the gradient is spread."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            return [self.aten.expand(only(flowed), node.inputs[0].dims)]

        x = self.widened(x)
        dims = (*x.dims[:-1], ONE)
        out = self.aten.new("sum.dim_IntList", name, dims, x.itemsize, reads=(x,))
        return self._record(backward, (x,), out)

    def sum_of(self, x: Tensor, name: str) -> Tensor:
        """[N, k, h] summed over k, which goes."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            gradient = only(flowed)
            apart = self.aten.as_view(gradient, (gradient.dims[0], ONE, gradient.dims[1]))
            assert apart is not None
            return [self.aten.expand(apart, like.dims)]

        x = self.widened(x)
        dims = (x.dims[0], x.dims[2])
        out = self.aten.new("sum.dim_IntList", name, dims, x.itemsize, reads=(x,))
        return self._record(backward, (x,), out)
