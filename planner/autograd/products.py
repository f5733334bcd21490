"""Matrix products and linear layers.

Formulas, saved tensors and order of gradients are those of tools/autograd/derivatives.yaml of
torch 2.13 (see recording.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.autograd.recording import only
from planner.autograd.tensors import Dims, Gradients, Like, Node, Tensor
from planner.autograd.views import Views
from planner.program import Shape

FLOAT32 = 4


class Products(Views):
    """Matrix products."""

    def matmul(self, a: Tensor, b: Tensor, name: str, *, kernel: str = "mm") -> Tensor:
        """a · b, of matrices (mm) or as many pairs of them (bmm): each is saved for the other."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            gradient, kept = only(flowed), iter(node.saved)
            made: Gradients = [None, None]
            if node.wants[1]:
                called = f"gradient of {node.inputs[1].name}"
                made[1] = self._right_gradient(next(kept), node.inputs[1], gradient, called, kernel)
            if node.wants[0]:
                turned = self.aten.transpose(next(kept), -2, -1)
                called = f"gradient of {node.inputs[0].name}"
                made[0] = self.aten.mm(gradient, turned, called, kernel=kernel)
            return made

        b = self.lowered(b)
        a = self.lowered(a)
        out = self.aten.mm(a, b, name, kernel=kernel)
        return self._record(backward, (a, b), out, _needed(a, b))

    def _right_gradient(
        self, a: Tensor, b: Like, gradient: Tensor, called: str, kernel: str
    ) -> Tensor:
        """aᵀ · gradient; as its transpose where b is one of a row-major matrix (a weight)."""
        if kernel == "mm" and b.strides == (1, b.sizes[0]):
            turned = self.aten.transpose(gradient, 0, 1)
            return self.aten.transpose(self.aten.mm(turned, a, called), 0, 1)
        return self.aten.mm(self.aten.transpose(a, -2, -1), gradient, called, kernel=kernel)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        """x · Wᵀ (+ b) of rows: [..., in] → [..., out]."""
        bias = None if bias is None else self.lowered(bias)
        weight = self.lowered(weight)
        x = self.lowered(x)
        rows: Dims = (tuple(e for dim in x.dims[:-1] for e in dim), x.dims[-1])
        turned = self.transpose(weight, 0, 1)
        flat = self.view(x, rows)
        if bias is None:
            out = self.matmul(flat, turned, name)
        else:
            out = self.addmm(bias, flat, turned, name)
        out = self.view(out, (*x.dims[:-1], weight.dims[0]), name)
        del flat  # of arguments that nobody else holds the first one goes first
        return out

    def addmm(self, bias: Tensor, a: Tensor, b: Tensor, name: str) -> Tensor:
        """bias + a · b: the bias takes the gradient as it is, to be summed over the rows."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            gradient, kept = only(flowed), list(node.saved)
            made: Gradients = [gradient if node.wants[0] else None, None, None]
            if node.wants[1]:
                turned = self.aten.transpose(kept.pop(), 0, 1)
                made[1] = self.aten.mm(gradient, turned, f"gradient of {node.inputs[1].name}")
            if node.wants[2]:
                called = f"gradient of {node.inputs[2].name}"
                made[2] = self._right_gradient(kept.pop(), node.inputs[2], gradient, called, "mm")
            return made

        b = self.lowered(b)
        a = self.lowered(a)
        bias = self.lowered(bias)
        out = self.aten.mm(a, b, name, kernel="addmm")
        return self._record(backward, (bias, a, b), out, _needed(a, b))

    def baddbmm(self, bias: Tensor, a: Tensor, b: Tensor, name: str) -> Tensor:
        """bias + number · a · b of as many pairs of matrices; the bias is not trained."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            gradient, (a, b) = only(flowed), node.saved
            made: Gradients = []
            for index, (left, right) in enumerate(((gradient, b), (a, gradient))):
                called = f"gradient of {node.inputs[index].name}"
                turned = (
                    (left, self.aten.transpose(right, 1, 2))
                    if index == 0
                    else (self.aten.transpose(left, 1, 2), right)
                )
                product = self.aten.mm(*turned, called, kernel="bmm")
                made.append(self.aten.elementwise("mul.Tensor", called, product))
                del product, turned
            return made

        b = self.lowered(b)
        a = self.lowered(a)
        bias = self.lowered(bias)
        *pairs, m, k = a.dims
        dims = (*pairs, m, b.dims[-1])
        flops = (2, *(e for dim in (*dims, k) for e in dim))
        out = self.aten.new("baddbmm", name, dims, a.itemsize, flops=flops, reads=(bias, a, b))
        return self._record(backward, (a, b), out, (a, b))

    def grouped_mm(
        self,
        x: Tensor,
        weight: Tensor,
        offsets: Tensor,
        name: str,
        *,
        read: Shape,
        scratch: Sequence[tuple[Shape, int]] = (),
    ) -> Tensor:
        """Rows of x [rows, in] times the matrix [E, in, out] of each row's group, which ends there.

        `read`: bytes of the matrices that are reached; `scratch`: of each such product. The
        matrices are transposed weights, whose gradient is made as it lies.
        """

        def backward(node: Node, flowed: Gradients) -> Gradients:
            gradient, kept = only(flowed), node.saved[:-1]
            made: Gradients = [None, None]
            for index in (1, 0):  # mat2 before self
                like = node.inputs[index]
                if not node.wants[index]:
                    continue
                called, strides = f"gradient of {like.name}", like.strides if index else None
                made[index] = self.aten.new(
                    "_grouped_mm",
                    called,
                    like.dims,
                    like.itemsize,
                    strides=strides,
                    flops=flops,
                    reads=(gradient, kept[0 if index else -1]),
                    scratch=scratch,
                )
            return made

        dims = (x.dims[0], weight.dims[2])
        flops = (2, *(e for dim in (*dims, x.dims[1]) for e in dim))
        out = self.aten.new(
            "_grouped_mm",
            name,
            dims,
            x.itemsize,
            flops=flops,
            reads=(x,),
            rows=(read,),
            scratch=scratch,
        )
        return self._record(backward, (x, weight), out, (*_needed(x, weight), offsets))


def _needed(a: Tensor, b: Tensor) -> list[Tensor]:
    """What a product saves: each factor where the other one wants a gradient, the first before."""
    return [x for x, other in ((a, b), (b, a)) if other.node is not None]
