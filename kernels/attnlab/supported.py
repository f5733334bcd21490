"""What of a planner.Model runs here: refused in one place, by name."""

from __future__ import annotations

from planner.errors import ConfigError
from planner.model import Model
from planner.runtimes.attnlab import missing_parts


def check_model(model: Model) -> None:
    """ConfigError for the parts that the planner's attnlab runtime says are missing here."""
    missing = missing_parts(model)
    if missing:
        raise ConfigError(f"attnlab does not run {missing[0]} of {model.model_type}")
