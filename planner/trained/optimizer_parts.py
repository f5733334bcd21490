"""What an optimizer walks through: runs of equal parts of the model, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

from planner.model import Model
from planner.program import Tape
from planner.tensors import Parameter

Sizes = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A run of equal parts of the model: the shapes of each one's parameters, in their order.

    `first_layer` None: they stand outside the blocks.
    """

    label: str
    shapes: tuple[Sizes, ...]
    count: int = 1
    first_layer: int | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each parameter."""
        return tuple(prod(shape) for shape in self.shapes)

    def with_shapes(self, wanted: Callable[[Sizes], bool]) -> Part:
        """The part with these of its parameters alone."""
        return replace(self, shapes=tuple(shape for shape in self.shapes if wanted(shape)))


@contextmanager
def once(tape: Tape, label: str, part: Part) -> Iterator[bool]:
    """A segment of this label; False where it is written already, and repeated."""
    if tape.again(label, count=part.count, first_layer=part.first_layer):
        yield False
        return
    with tape.segment(label, count=part.count, first_layer=part.first_layer):
        yield True


def rows(shape: Sizes) -> int:
    """One number for each row of a matrix, or of many."""
    return prod(shape[:-1])


def columns(shape: Sizes) -> int:
    """One number for each column of a matrix, or of many."""
    return prod(shape[:-2]) * shape[-1]


def has_gradient(model: Model, p: Parameter) -> bool:
    """Whether the forward reads it, else no optimizer steps it.

    BERT's head keeps two biases where it is untied, and adds its decoder's alone.
    """
    if p.name != "lm_head.bias":
        return True
    return not any(beside.name.endswith(".decoder.bias") for beside in model.extra_parameters)


def is_hidden(shape: Sizes, layer: int | None) -> bool:
    """Whether Muon's own rule takes it: matrices of hidden layers, neither embedding nor head."""
    return layer is not None and len(shape) == 2
