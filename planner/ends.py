"""What an encoder has before and behind its blocks: sums, norms and heads that only it has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from planner.layers import Activation, Norm

Reads = Literal["all", "first", "mean", "pooled"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A linear layer behind the blocks, what its outputs go through, and a norm of them.

    `name`, `norm_name`: the modules' names in `Model.parameters()`.
    """

    name: str
    activation: Activation | Literal["tanh"] | None = None
    norm: Norm | None = None
    norm_name: str = ""

    def modules(self) -> Iterator[str]:
        """Names of what has parameters."""
        yield self.name
        if self.norm is not None:
            yield self.norm_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Patches:
    """An image cut by a convolution whose stride is its kernel; a class token, learned positions.

    `image_size`: (height, width) in pixels.
    """

    image_size: tuple[int, int]
    projection: str
    class_token: str
    positions: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    """How the `extra_parameters` of an encoder are used, by their names there.

    Tokens: embedding + `token_types`, a table's name, + positions, then `embedding_norm`. Images:
    `patches`. Behind the blocks `final_norm`, where no field of the Model is that norm; `pooler`
    reads the first token. The head `reads` the states of "all" tokens, of the "first", their
    "mean" or what the pooler makes, goes through `steps` and ends in the language-model head where
    there is one. `padding`: the token id that takes no position (roberta).
    """

    token_types: str | None = None
    embedding_norm: tuple[str, Norm] | None = None
    padding: int | None = None
    patches: Patches | None = None
    final_norm: tuple[str, Norm] | None = None
    pooler: Step | None = None
    reads: Reads = "all"
    steps: tuple[Step, ...] = ()

    def uses(self, parameter: str) -> bool:
        """Whether a parameter of that name is one of these."""
        return parameter in self._whole() or parameter.rpartition(".")[0] in self._modules()

    def _whole(self) -> tuple[str, ...]:
        return (self.patches.class_token, self.patches.positions) if self.patches else ()

    def _modules(self) -> Iterator[str]:
        yield from (named[0] for named in (self.embedding_norm, self.final_norm) if named)
        if self.token_types is not None:
            yield self.token_types
        if self.patches is not None:
            yield self.patches.projection
        for step in (*self.steps, *((self.pooler,) if self.pooler else ())):
            yield from step.modules()
