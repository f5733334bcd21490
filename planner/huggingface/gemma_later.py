"""Readers of gemma3n and gemma4."""

from __future__ import annotations

from collections.abc import Callable

from planner.huggingface.fields import Fields
from planner.model import Model

READERS: dict[str, Callable[[Fields], Model]] = {}
