"""Readers of bert, roberta, xlm-roberta, deberta, deberta-v2 and modernbert."""

from __future__ import annotations

from collections.abc import Callable

from planner.huggingface.fields import Fields
from planner.model import Model

READERS: dict[str, Callable[[Fields], Model]] = {}
