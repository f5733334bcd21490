"""Readers of mamba, falcon_mamba, mamba2, bamba, granitemoehybrid, jamba and falcon_h1."""

from __future__ import annotations

from collections.abc import Callable

from planner.huggingface.fields import Fields
from planner.model import Model

READERS: dict[str, Callable[[Fields], Model]] = {}
