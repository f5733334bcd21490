"""A loss for each row, and the sum of all: cross-entropy in pieces.

Formulas, saved tensors and order of gradients are those of tools/autograd/derivatives.yaml of
torch 2.13 (see recording.py).
"""

from __future__ import annotations

from planner.autograd.autocast import Autocast
from planner.autograd.recording import only
from planner.autograd.tensors import Gradients, Node, Tensor


class Losses(Autocast):
    """What is left of log-probabilities."""

    def nll_losses(self, log_probabilities: Tensor, labels: Tensor) -> Tensor:
        """Negative log-likelihoods [N, V] → [N]: nll_loss with reduction="none"."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            kept, called = node.saved[0], f"gradient of {node.inputs[0].name}"
            return [self.aten.new("nll_loss_backward", called, kept.dims, kept.itemsize)]

        b, reads = log_probabilities.itemsize, (log_probabilities,)
        losses = self.aten.new(
            "nll_loss_forward", "losses", log_probabilities.dims[:1], b, reads=reads
        )
        count = self.aten.new("nll_loss_forward", "count of labels", (), b)
        return self._record(
            backward, (log_probabilities,), losses, (log_probabilities, count, labels)
        )

    def total(self, x: Tensor, name: str) -> Tensor:
        """The sum of a vector: the gradient is spread."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            return [self.aten.expand(only(flowed), node.inputs[0].dims)]

        out = self.aten.new("sum", name, (), x.itemsize, reads=(x,))
        return self._record(backward, (x,), out)

    def divide_by_count(self, x: Tensor, count: Tensor, name: str) -> Tensor:
        """x / count, an integer, which is saved: the quotient is of x's dtype."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like, (count,) = node.inputs[0], node.saved
            called = f"gradient of {like.name}"
            return [
                self.aten.elementwise(
                    "div.Tensor", called, only(flowed), count, itemsize=like.itemsize
                )
            ]

        out = self.aten.elementwise("div.Tensor", name, x, count, itemsize=x.itemsize)
        return self._record(backward, (x,), out, (count,))
