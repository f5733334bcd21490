"""Readers of deepseek_v32, deepseek_v4, glm_moe_dsa, glm5_next, glm4_moe_lite, mistral4."""

from __future__ import annotations

from collections.abc import Callable

from planner.huggingface.fields import Fields
from planner.model import Model

READERS: dict[str, Callable[[Fields], Model]] = {}
