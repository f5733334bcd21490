"""Token mixers that keep a state of their own in place of one key and value for each token.

A mixer describes itself: its parameters and what a cache keeps of it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from planner.tensors import Parameter, State


class Mixer:
    """What a mixer says of itself; subclasses are frozen dataclasses."""

    __slots__ = ()

    @property
    @abstractmethod
    def kind(self) -> str:
        """What people call it."""

    @abstractmethod
    def parameters(self, hidden_size: int) -> Iterator[Parameter]:
        """Trained tensors, named relative to the block as in `planner.parameters`."""

    @abstractmethod
    def states(self, tokens: int, *, static: bool = False) -> tuple[State, ...]:
        """What one sequence keeps after `tokens` tokens; `static`: allocated for so many."""
