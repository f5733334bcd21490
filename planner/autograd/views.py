"""Views, copies, joins: the ops that compute nothing.

Formulas, saved tensors and order of gradients are those of tools/autograd/derivatives.yaml of
torch 2.13 (see recording.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.autograd.autocast import Autocast
from planner.autograd.recording import only
from planner.autograd.tensors import Backward, Dims, Gradients, Node, Tensor
from planner.program import Extent


class Views(Autocast):
    """Ops that move nothing, or copy."""

    def view(self, x: Tensor, dims: Dims, name: str = "") -> Tensor:
        """x.reshape(dims): a view, or a copy where it cannot be one."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            return [self.aten.reshape(only(flowed), node.inputs[0].dims)]

        seen = self.aten.reshape(x, dims)
        out = replace(seen, node=None, output=0, name=name or x.name)
        return self._record(backward, (x,), out)

    def transpose(self, x: Tensor, a: int, b: int) -> Tensor:
        """Two dimensions exchanged: a view."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            return [self.aten.transpose(only(flowed), a, b)]

        return self._record(backward, (x,), self.aten.transpose(x, a, b))

    def permute(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """x with its dimensions in another order: a view."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            back = [order.index(i) for i in range(len(order))]
            return [self.aten.permute(only(flowed), back)]

        return self._record(backward, (x,), self.aten.permute(x, order))

    def narrow(self, x: Tensor, length: Extent, dim: int = -1) -> Tensor:
        """The first, or the last, `length` of a dimension: a view."""
        if x.dims[dim] == (length,):  # torch aliases; gradients meet at the alias
            return self._record(lambda node, flowed: [only(flowed)], (x,), replace(x))
        return self._record(self._slice_backward, (x,), self.aten.narrow(x, dim, length))

    def every_second(self, x: Tensor) -> Tensor:
        """x[..., ::2] or x[..., 1::2]: a view."""
        width = x.dims[-1][0]
        assert isinstance(width, int)
        half = self.aten.narrow(x, -1, width // 2)
        half.strides = (*x.strides[:-1], 2 * x.strides[-1])
        return self._record(self._slice_backward, (x,), half)

    def select(self, x: Tensor, dim: int) -> Tensor:
        """x at one place of a dimension, which goes: a view."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            called = f"gradient of {like.name}"
            return [self.aten.new("select_backward", called, like.dims, like.itemsize)]

        return self._record(backward, (x,), self.aten.select(x, dim))

    def _slice_backward(self, node: Node, flowed: Gradients) -> Gradients:
        like = node.inputs[0]
        called = f"gradient of {like.name}"
        return [self.aten.new("slice_backward", called, like.dims, like.itemsize)]

    def split(self, x: Tensor, lengths: Sequence[Extent], dim: int = -1) -> list[Tensor]:
        """A dimension in parts: views. The way back joins the parts' gradients."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            parts = [part for part in flowed if part is not None]
            return [self.aten.cat(parts, dim, like, f"gradient of {like.name}")]

        return self._several(backward, x, [self.aten.narrow(x, dim, n) for n in lengths])

    def unbind(self, x: Tensor, dim: int) -> list[Tensor]:
        """x at each place of a dimension: views. The way back stacks their gradients."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            parts = [part for part in flowed if part is not None]
            return [self.aten.stack(parts, dim, f"gradient of {like.name}")]

        return self._several(backward, x, self.aten.unbind(x, dim))

    def _several(self, backward: Backward, x: Tensor, parts: list[Tensor]) -> list[Tensor]:
        if x.node is not None:
            node = Node(x.name, backward, (x,), (), outputs=len(parts))
            self.graph.nodes.append(node)
            for output, part in enumerate(parts):
                part.node, part.output = node, output
        return parts

    def stack(self, parts: Sequence[Tensor], dim: int, name: str) -> Tensor:
        """Equal parts along a new dimension (counted from behind); the way back unbinds."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            return list(self.aten.unbind(only(flowed), dim))

        return self._record(backward, parts, self.aten.stack(parts, dim, name))

    def expand(self, x: Tensor, dims: Dims) -> Tensor:
        """x repeated to other sizes: a view; the gradient is summed up."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            return [only(flowed)]  # summed to the input's size as every gradient is

        return self._record(backward, (x,), self.aten.expand(x, dims))

    def contiguous(self, x: Tensor, name: str) -> Tensor:
        """x.contiguous(): x itself, or a copy."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            return [only(flowed)]

        out = self.aten.contiguous(x)
        return x if out is x else self._record(backward, (x,), replace(out, node=None, name=name))

    def cat(self, parts: Sequence[Tensor], dims: Dims, name: str, *, dim: int = -1) -> Tensor:
        """Parts joined along a dimension; their gradients are views of the whole's."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            whole = only(flowed)
            return [
                self.aten.narrow(whole, dim, like.dims[dim][0]) if wanted else None
                for like, wanted in zip(node.inputs, node.wants, strict=True)
            ]

        parts = self.promoted(parts)
        return self._record(backward, parts, self.aten.cat(parts, dim, dims, name))
