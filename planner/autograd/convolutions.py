"""Convolutions of width 1 over a sequence, and columns that are copied to their places.

Formulas, saved tensors and order of gradients are those of tools/autograd/derivatives.yaml of
torch 2.13 (see recording.py).
"""

from __future__ import annotations

from planner.autograd.autocast import Autocast
from planner.autograd.recording import only
from planner.autograd.tensors import Dims, Gradients, Node, Tensor


class Convolutions(Autocast):
    """F.conv1d with kernels of one, and index_copy."""

    def conv1d(self, x: Tensor, weight: Tensor, name: str) -> Tensor:
        """[B, in, T] by weights [out, in / groups, 1] → [B, out, T]: both are saved."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            reads, made = (only(flowed), *node.saved), list[Tensor | None]()
            for like, wanted in zip(node.inputs, node.wants, strict=True):
                called = f"gradient of {like.name}"
                made.append(
                    self.aten.new(
                        "convolution_backward",
                        called,
                        like.dims,
                        like.itemsize,
                        flops=flops,
                        reads=reads,
                    )
                    if wanted
                    else None
                )
            return made

        dims: Dims = (x.dims[0], weight.dims[0], x.dims[2])
        flops = (2, *(e for dim in (*dims, weight.dims[1]) for e in dim))
        out = self.aten.new("convolution", name, dims, x.itemsize, flops=flops, reads=(x, weight))
        return self._record(backward, (x, weight), out, (x, weight))

    def index_copy(self, zeros: Tensor, index: Tensor, x: Tensor, name: str) -> Tensor:
        """Columns of x put among those of zeros, out of place: x is saved, and where they go."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            called = f"gradient of {like.name}"
            reads = (only(flowed),)
            return [self.aten.new("index_select", called, like.dims, like.itemsize, reads=reads)]

        out = self.aten.new("index_copy", name, zeros.dims, x.itemsize, reads=(zeros, x))
        return self._record(backward, (x,), out, (x, index))
