"""Readers of nemotron_h, zamba2, recurrent_gemma, rwkv, lfm2, lfm2_moe, lfm3 and minimax."""

from __future__ import annotations

from collections.abc import Callable

from planner.huggingface.fields import Fields
from planner.model import Model

READERS: dict[str, Callable[[Fields], Model]] = {}
