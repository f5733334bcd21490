"""Master weights: a model of 16 bits, and float32 copies of its weights, which the optimizer steps.

arXiv:1710.03740, §3.1, with the order of events of Megatron-LM's Float16OptimizerWithFloat16Params
(megatron/core/optimizer/optimizer.py), gradients being the parameters' own (no main_grad buffers):

1. before the first step `copy = p.detach().float()` of all that is trained, for the optimizer;
2. forward and backward in 16 bits; in fp16 the loss is scaled by a torch.amp.GradScaler;
3. one parameter after the other, in the module's order: `copy.grad = p.grad.float()`, and
   `p.grad = None` (_copy_model_grads_to_main_grads);
4. the optimizer's step on the copies, in fp16 through the scaler;
5. `p.copy_(copy)` (_copy_main_params_to_model_params), in place;
6. gradients of both set to None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from planner.autograd.products import FLOAT32
from planner.autograd.tensors import Leaf
from planner.program import Buffer, Tape
from planner.trained.optimizer_parts import Part, once

IN_FLOAT32 = "gradients in float32"


class MasterCopies:
    """Writes what passes between weights of `b` bytes an element and their copies."""

    def __init__(self, tape: Tape, b: int) -> None:
        self.tape, self.b = tape, b
        self.gradients: dict[str, list[Buffer]] = {}  # of the copies, by part

    def take(self, parts: Sequence[Part], leaves: Mapping[str, Iterable[Leaf]]) -> None:
        """The gradients, which those of the weights make room for one by one."""
        layers = {part.label for part in parts if part.first_layer is not None}
        # outside the blocks a part may use what is another's by its place in the module
        ends = _by_size(leaf for label in leaves if label not in layers for leaf in leaves[label])
        for part in parts:
            waiting = _by_size(leaves[part.label]) if part.label in layers else ends
            with once(self.tape, f"{IN_FLOAT32}: {part.label}", part) as anew:
                if anew:
                    self.gradients[part.label] = self._cast_all(part, waiting)

    def _cast_all(self, part: Part, waiting: Mapping[int, list[Leaf]]) -> list[Buffer]:
        """In the order of the parameters; a leaf of as many elements is one's own."""
        made = []
        for size in part.sizes:
            leaf = waiting[size].pop(0)
            wide = Buffer(
                name="gradient in float32", shape=(size,), itemsize=FLOAT32, gradient=True
            )
            moved = ((size, self.b),)
            made.append(
                self.tape.new(
                    wide.name, wide.shape, FLOAT32, moved=moved, into=wide, kernel="_to_copy"
                )
            )
            leaf.grad = None
        return made

    def give(self, parts: Sequence[Part]) -> None:
        """The new weights, rounded; then the gradients go."""
        for part in parts:
            with once(self.tape, f"weights from their copies: {part.label}", part) as anew:
                if anew:
                    total = sum(part.sizes)
                    moved = ((total, FLOAT32), (total, self.b))
                    self.tape.run("weights from their copies", moved=moved, kernel="copy_")
        for part in parts:
            with once(self.tape, f"zero_grad of copies: {part.label}", part) as anew:
                if anew:
                    self.tape.free(*self.gradients[part.label])


def _by_size(leaves: Iterable[Leaf]) -> dict[int, list[Leaf]]:
    found: dict[int, list[Leaf]] = {}
    for leaf in leaves:
        found.setdefault(prod(leaf.tensor.sizes), []).append(leaf)
    return found
