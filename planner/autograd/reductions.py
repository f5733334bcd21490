"""Means, softmax, norms.

Formulas, saved tensors and order of gradients are those of tools/autograd/derivatives.yaml of
torch 2.13 (see recording.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.autograd.aten import ONE
from planner.autograd.autocast import FLOAT32, Autocast
from planner.autograd.recording import only
from planner.autograd.reduction_scratch import softmax_scratch
from planner.autograd.tensors import Gradients, Node, Tensor
from planner.program import Shape


class Reductions(Autocast):
    """Ops along the last dimension.

    `softmax_casts`: the kernel of softmax takes 16 bits to float32 itself (fp16 on CUDA).
    """

    softmax_casts = False

    def mean(self, x: Tensor, name: str) -> Tensor:
        """Over the last dimension, which stays as one: the gradient is spread and divided."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            spread = self.aten.expand(only(flowed), like.dims)
            return [self.aten.elementwise("div.Scalar", f"gradient of {like.name}", spread)]

        out = self.aten.new("mean.dim", name, (*x.dims[:-1], ONE), x.itemsize, reads=(x,))
        return self._record(backward, (x,), out)

    def softmax(
        self, x: Tensor, name: str, *, kernel: str = "_softmax", to: int | None = None
    ) -> Tensor:
        """Softmax, or its logarithm, over the last dimension: the result is saved.

        `to`: bytes of an element of the dtype that the call names, for which x is cast; None: it
        names none, and autocast with the long list says float32. CUDA's kernel casts fp16 to that
        itself (ATen/native/SoftMax.cpp).
        """

        def backward(node: Node, flowed: Gradients) -> Gradients:
            (result,), called = node.saved, f"gradient of {node.inputs[0].name}"
            reads = (only(flowed), result)
            scratch: list[tuple[Shape, int]] = []
            if self.aten.on_gpu and back == "_softmax":
                scratch = softmax_scratch(result.shape, result.itemsize)
            return [
                self.aten.new(
                    f"{back}_backward_data",
                    called,
                    result.dims,
                    node.inputs[0].itemsize,
                    reads=reads,
                    scratch=scratch,
                )
            ]

        back = kernel.replace("_safe", "")
        made = to or (FLOAT32 if self.low is not None and self.widens else x.itemsize)
        if made != FLOAT32 or not self.softmax_casts:
            x = self.cast(x, made, f"float32 {x.name}" if made == FLOAT32 else x.name)
        out = self.aten.new(kernel, name, x.dims, made, reads=(x,))
        return self._record(backward, (x,), out, (out,))

    def layer_norm(
        self, x: Tensor, weights: Sequence[Tensor], name: str, *, statistics_bytes: int
    ) -> Tensor:
        """LayerNorm: saves x and the mean and inverse deviation of each row."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            reads = (only(flowed), *node.saved)
            return [
                self.aten.new(
                    "native_layer_norm_backward",
                    f"gradient of {like.name}",
                    like.dims,
                    like.itemsize,
                    reads=reads if index == 0 else (),
                )
                if node.wants[index]
                else None
                for index, like in enumerate(node.inputs)
            ]

        x = self.widened(x)
        out = self.aten.new("native_layer_norm", name, x.dims, x.itemsize, reads=(x, *weights))
        column = (*x.dims[:-1], ONE)
        rows = [
            self.aten.new("native_layer_norm", f"{name} statistics", column, statistics_bytes)
            for _ in ("mean", "1 / deviation")
        ]
        return self._record(backward, (x, *weights), out, (x, *rows, *weights))
