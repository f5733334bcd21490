"""What of a planner.Model runs here: refused in one place, by name."""

from __future__ import annotations

from planner.errors import ConfigError
from planner.layers import GQA, MLA


def grouped_query(attention: GQA | MLA) -> GQA:
    """The attention, if attnlab runs it; ConfigError otherwise."""
    if not isinstance(attention, GQA):
        raise ConfigError(f"attention={type(attention).__name__} does not run in attnlab: GQA")
    return attention
