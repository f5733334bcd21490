"""How many examples a property draws: a number of its own, times what the profile asks for."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

HYPOTHESIS_EXAMPLES = 100  # of a profile that says nothing


def examples(count: int = HYPOTHESIS_EXAMPLES, *, fuzz: int | None = None, **options: Any) -> Any:
    """Settings of a property that draws `count` examples; PLANNER_FUZZ=10 ten times `fuzz`.

    `fuzz` is `count` unless given. A profile alone cannot scale what `@settings(max_examples=…)`
    fixes.
    """
    asked = settings().max_examples / HYPOTHESIS_EXAMPLES
    if is_fuzzed():
        count = fuzz or count
    return settings(max_examples=max(1, round(count * asked)), **options)


def is_fuzzed() -> bool:
    """Whether this run draws other examples than usual, and more (tests/conftest.py)."""
    return settings.get_current_profile_name() == "fuzz"
