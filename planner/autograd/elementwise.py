"""Elementwise ops.

Formulas, saved tensors and order of gradients are those of tools/autograd/derivatives.yaml of
torch 2.13 (see recording.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.autograd.autocast import Autocast
from planner.autograd.recording import only
from planner.autograd.tensors import Gradients, Node, Tensor

BOOL = 1


class Elementwise(Autocast):
    """Ops on each element."""

    def add(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """a + b: nothing is saved, both take the gradient as it is."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            return [only(flowed) if wanted else None for wanted in node.wants]

        return self._record(backward, (a, b), self.aten.elementwise("add.Tensor", name, a, b))

    def sub(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """a − b: b takes the gradient with its sign turned."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            gradient, made = only(flowed), list[Tensor | None]((None, None))
            if node.wants[1]:
                called = f"gradient of {node.inputs[1].name}"
                made[1] = self.aten.elementwise("neg", called, gradient)
            if node.wants[0]:
                made[0] = gradient
            return made

        return self._record(backward, (a, b), self.aten.elementwise("sub.Tensor", name, a, b))

    def clamp(self, x: Tensor, name: str, *, low: bool = True) -> Tensor:
        """x between two numbers: where(x >= low & x <= high, grad, 0); or below one alone."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            (x,), called = node.saved, f"gradient of {node.inputs[0].name}"
            zero = self.aten.number(called, x.itemsize)
            words = ("ge.Scalar", "le.Scalar") if low else ("le.Scalar",)
            kept = [self.aten.elementwise(word, called, x, itemsize=BOOL) for word in words]
            gradient = self.aten.elementwise("where.self", called, kept[0], only(flowed), zero)
            del kept
            return [gradient]

        return self._record(backward, (x,), self.aten.elementwise("clamp", name, x), (x,))

    def shift(self, x: Tensor, name: str) -> Tensor:
        """x + number."""
        out = self.aten.elementwise("add.Tensor", name, x)
        return self._record(lambda node, flowed: [only(flowed)], (x,), out)

    def scale(self, x: Tensor, name: str, *, kernel: str = "mul.Tensor") -> Tensor:
        """x · number, x / number or −x (`kernel`)."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            called = f"gradient of {node.inputs[0].name}"
            return [self.aten.elementwise(kernel, called, only(flowed))]

        return self._record(backward, (x,), self.aten.elementwise(kernel, name, x))

    def mul(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """a · b: each is saved where the other wants a gradient."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            gradient, kept = only(flowed), iter(node.saved)
            made: Gradients = [None, None]
            for index in (1, 0):
                if node.wants[index]:
                    called = f"gradient of {node.inputs[index].name}"
                    factor = next(kept)
                    made[index] = self.aten.elementwise("mul.Tensor", called, gradient, factor)
            return made

        saved = [x for x, other in ((a, b), (b, a)) if other.node is not None]
        out = self.aten.elementwise("mul.Tensor", name, a, b)
        return self._record(backward, (a, b), out, saved)

    def power(self, x: Tensor, name: str) -> Tensor:
        """xⁿ of a number n: grad · (n · xⁿ⁻¹)."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            (x,), called = node.saved, f"gradient of {node.inputs[0].name}"
            lower = self.aten.elementwise("pow.Tensor_Scalar", called, x)
            scaled = self.aten.elementwise("mul.Scalar", called, lower)
            return [self.aten.elementwise("mul.Tensor", called, only(flowed), scaled)]

        x = self.widened(x)
        out = self.aten.elementwise("pow.Tensor_Scalar", name, x)
        return self._record(backward, (x,), out, (x,))

    def rsqrt(self, x: Tensor, name: str) -> Tensor:
        """1 / √x: −½ · grad · result³."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            (result,), called = node.saved, f"gradient of {node.inputs[0].name}"
            cube = self.aten.elementwise("pow.Tensor_Scalar", called, result)
            half = self.aten.elementwise("mul.Scalar", called, only(flowed))
            return [self.aten.elementwise("mul.Tensor", called, half, cube)]

        x = self.widened(x)
        out = self.aten.elementwise("rsqrt", name, x)
        return self._record(backward, (x,), out, (out,))

    def pointwise(self, x: Tensor, name: str, kernel: str, *, saves: str) -> Tensor:
        """silu, gelu: the input is saved; tanh, relu: the result. One kernel goes back."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            (kept,), called = node.saved, f"gradient of {node.inputs[0].name}"
            back = "threshold_backward" if kernel == "relu" else f"{kernel}_backward"
            return [self.aten.elementwise(back, called, only(flowed), kept)]

        out = self.aten.elementwise(kernel, name, x)
        return self._record(backward, (x,), out, (x if saves == "input" else out,))

    def where(self, mask: Tensor, x: Tensor, name: str) -> Tensor:
        """x where the mask lets through, a number elsewhere: the mask is saved."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            (mask,), called = node.saved, f"gradient of {node.inputs[0].name}"
            return [self.aten.where(mask, only(flowed), called)]

        return self._record(backward, (x,), self.aten.where(mask, x, name), (mask,))

    # -- in place: the result is the operand's storage --------------------------------------------

    def clamp_(self, x: Tensor, name: str) -> Tensor:
        """x between two numbers, in place: what it was is saved as a copy."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            (before,), called = node.saved, f"gradient of {node.inputs[0].name}"
            zero = self.aten.number(called, before.itemsize)
            above = self.aten.elementwise("ge.Scalar", called, before, itemsize=BOOL)
            below = self.aten.elementwise("le.Scalar", called, before, itemsize=BOOL)
            gradient = self.aten.elementwise("where.self", called, above, only(flowed), zero)
            del below
            return [gradient]

        return self._record(backward, (x,), replace(x, node=None, name=name), self._before(x, x))

    def scale_(self, x: Tensor, *, kernel: str = "mul_.Tensor") -> Tensor:
        """x · number or x / number, in place."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            called = f"gradient of {node.inputs[0].name}"
            return [self.aten.elementwise(kernel.replace("_", ""), called, only(flowed))]

        return self._record(backward, (x,), replace(x, node=None))

    def add_(self, x: Tensor, other: Tensor) -> Tensor:
        """x + other, in place."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            return [only(flowed) if wanted else None for wanted in node.wants]

        return self._record(backward, (x, other), replace(x, node=None))

    def divide(self, x: Tensor, other: Tensor, name: str) -> Tensor:
        """x / other: both are saved; only the divisor where it is not trained."""
        out = self.aten.elementwise("div.Tensor", name, x, other)
        saved = (other,) if other.node is None else (x, other)
        return self._record(self._divide_backward, (x, other), out, saved)

    def divide_(self, x: Tensor, other: Tensor) -> Tensor:
        """x / other, in place: what x was is saved as a copy, the divisor as it is."""
        saved = (*self._before(x, x), other)
        return self._record(self._divide_backward, (x, other), replace(x, node=None), saved)

    def _divide_backward(self, node: Node, flowed: Gradients) -> Gradients:
        gradient, (*whole, other) = only(flowed), node.saved
        if not node.wants[1]:
            return [self.aten.elementwise("div.Tensor", node.inputs[0].name, gradient, other), None]
        (before,), called = whole, f"gradient of {node.inputs[1].name}"
        made: Gradients = [None, None]
        once = self.aten.elementwise("div.Tensor", called, before, other)
        twice = self.aten.elementwise("div.Tensor", called, once, other)
        turned = self.aten.elementwise("neg", called, gradient)
        made[1] = self.aten.elementwise("mul.Tensor", called, turned, twice)
        del once, twice, turned
        made[0] = self.aten.elementwise("div.Tensor", node.inputs[0].name, gradient, other)
        return made

    def _before(self, x: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """A copy of what an op in place overwrites, where its way back needs it."""
        if x.node is None:
            return (x,)
        copy = self.aten.new("clone", x.name, like.dims, like.itemsize, strides=like.strides)
        return (copy,)

    def apart(
        self,
        x: Tensor,
        name: str,
        forward: Callable[[Tensor], Tensor],
        backward: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """A torch.autograd.Function: `forward` is not recorded, `backward` takes x and grad."""

        def back(node: Node, flowed: Gradients) -> Gradients:
            return [backward(node.saved[0], only(flowed))]

        out = replace(forward(x.detach()), node=None, name=name)
        return self._record(back, (x,), out, (x,))
