"""What of a planner.Model runs here: refused in one place, by name."""

from __future__ import annotations

from planner.errors import ConfigError
from planner.layers import GQA, MLA
from planner.model import Model
from planner.runtimes.attnlab import missing_parts


def grouped_query(attention: GQA | MLA) -> GQA:
    """The attention, if attnlab runs it; ConfigError otherwise."""
    if not isinstance(attention, GQA):
        raise ConfigError(f"attention={type(attention).__name__} does not run in attnlab: GQA")
    return attention


def check_model(model: Model) -> None:
    """ConfigError for the parts that the planner's attnlab runtime says are missing here."""
    missing = missing_parts(model)
    if missing:
        raise ConfigError(f"attnlab does not run {missing[0]} of {model.model_type}")
