"""Dropout: F.dropout in train mode, of torch 2.13 (ATen/native/Dropout.cpp).

A CUDA device has a kernel that saves which elements stayed, a byte each; elsewhere the noise is a
tensor of the input's dtype, by which it is multiplied.
"""

from __future__ import annotations

from planner.autograd.autocast import Autocast
from planner.autograd.elementwise import BOOL
from planner.autograd.recording import only
from planner.autograd.tensors import Gradients, Node, Tensor


class Noise(Autocast):
    """Dropout of a rate above 0."""

    def dropout(self, x: Tensor, name: str) -> Tensor:
        """x with some elements set to 0 and the others scaled."""
        kernel = "native_dropout" if self.aten.on_gpu else "mul.Tensor"
        back = "native_dropout_backward" if self.aten.on_gpu else "mul.Tensor"

        def backward(node: Node, flowed: Gradients) -> Gradients:
            called = f"gradient of {node.inputs[0].name}"
            return [self.aten.elementwise(back, called, only(flowed), itemsize=x_bytes)]

        x_bytes = x.itemsize
        if self.aten.on_gpu:
            out = self.aten.elementwise(kernel, name, x)
            mask = self.aten.elementwise(kernel, f"{name}, mask", x, itemsize=BOOL)
        else:
            mask = self.aten.elementwise("empty_like", f"{name}, noise", x)
            out = self.aten.elementwise(kernel, name, x, mask)
        return self._record(backward, (x,), out, (mask,))
