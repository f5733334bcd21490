"""What of a planner.Model runs here: refused in one place, by name."""

from __future__ import annotations

from planner.errors import ConfigError
from planner.layers import GQA, MLA, Dense
from planner.model import Model
from planner.runtimes.attnlab import Attnlab


def grouped_query(attention: GQA | MLA) -> GQA:
    """The attention, if attnlab runs it; ConfigError otherwise."""
    if not isinstance(attention, GQA):
        raise ConfigError(f"attention={type(attention).__name__} does not run in attnlab: GQA")
    return attention


def check_model(model: Model) -> None:
    """ConfigError for what the planner's attnlab runtime refuses: blocks, positions, heads."""
    for layer in model.layer_kinds():
        grouped_query(layer.attention)
        if not isinstance(layer.feed_forward, Dense):
            kind = type(layer.feed_forward).__name__
            raise ConfigError(f"feed_forward={kind} does not run in attnlab: Dense")
    Attnlab().attention(model, None)
