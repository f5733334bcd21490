"""How many examples a property draws: a number of its own, times what the profile asks for."""

from __future__ import annotations

from typing import Any

from hypothesis import settings

HYPOTHESIS_EXAMPLES = 100  # of a profile that says nothing


def examples(count: int = HYPOTHESIS_EXAMPLES, **options: Any) -> settings:
    """Settings of a property that draws `count` examples, ten times as many under PLANNER_FUZZ=10.

    A profile alone cannot scale what `@settings(max_examples=…)` fixes.
    """
    factor = settings().max_examples / HYPOTHESIS_EXAMPLES
    return settings(max_examples=max(1, round(count * factor)), **options)
