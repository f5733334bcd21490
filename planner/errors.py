"""What a caller gets when a description contradicts itself, and the checks that raise it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MAX_SIZE = 2**31
"""Largest size, count or length that any field may have: nothing overflows or hangs below it."""

MAX_LAYERS = 4096


class ConfigError(ValueError):
    """A model, hardware or workload description that cannot be right.

    The message is one line that names the field, its value and what is allowed.
    """


def shown(value: object) -> str:
    """`repr` of a value from outside, short enough for one line of text."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_size(field: str, value: Any, *, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
    """A whole number in [minimum, maximum]; ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise ConfigError(
            f"{field}={shown(value)} is not allowed: a whole number from {minimum} to {maximum}"
        )
    return value


def check_kind(field: str, value: Any, *kinds: type) -> None:
    """ConfigError for a value that is of none of the kinds: a name where a Model belongs."""
    if not isinstance(value, kinds):
        named = " or ".join(kind.__name__ for kind in kinds)
        how = ", which planner.load_model returns" if field == "model" else ""
        raise ConfigError(f"{field}={shown(value)} is not allowed: {_article(named)} {named}{how}")


def check_flags(owner: object, *fields: str) -> None:
    """ConfigError for a field that is neither True nor False."""
    for field in fields:
        if not isinstance(getattr(owner, field), bool):
            value = shown(getattr(owner, field))
            raise ConfigError(f"{field}={value} is not allowed: True or False")


def _article(word: str) -> str:
    return "an" if word[0] in "AEIOU" else "a"


def check_choice(field: str, value: Any, allowed: Iterable[str]) -> str:
    """One of the allowed words; ConfigError otherwise."""
    names = tuple(allowed)
    if value not in names:
        raise ConfigError(f"{field}={shown(value)} is not allowed: one of {', '.join(names)}")
    return str(value)
