"""Readers of qwen3_next, qwen3_5, qwen3_5_moe, olmo_hybrid and kimi_linear."""

from __future__ import annotations

from collections.abc import Callable

from planner.huggingface.fields import Fields
from planner.model import Model

READERS: dict[str, Callable[[Fields], Model]] = {}
