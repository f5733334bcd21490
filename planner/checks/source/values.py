"""What is known of a value in source, and what happened to it."""

from __future__ import annotations

import ast
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Value:
    """Tags of a value, and the parameters it comes from.

    Tags: "scores" (q·k), "scaled", "root" (by 1/√d), "masked", "touched" (passed through something
    unknown), "softmax", "turned" (last two dimensions swapped), "lower" and "upper" (true on that
    triangle), "hides-lower" (−inf there), "zeroed" (0 written to scores), "sum" (with a residual),
    "normed-sum".
    """

    tags: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    def __or__(self, other: Value) -> Value:
        return Value(self.tags | other.tags, self.origins | other.origins)

    def plus(self, *tags: str) -> Value:
        """With more tags."""
        return Value(self.tags | set(tags), self.origins)

    def minus(self, *tags: str) -> Value:
        """Without some tags."""
        return Value(self.tags - set(tags), self.origins)

    def has(self, *tags: str) -> bool:
        """Whether it has any of these tags."""
        return bool(self.tags & set(tags))


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened: softmax, product, filled, added, inverted, shifted, attention."""

    kind: str
    node: ast.AST
    value: Value
    other: Value = Value()
    extra: str = ""
