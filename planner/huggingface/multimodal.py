"""Readers of wrappers around a language model: llava, gemma3, mistral3, llama4, the Qwens."""

from __future__ import annotations

from collections.abc import Callable

from planner.huggingface.fields import Fields
from planner.model import Model

READERS: dict[str, Callable[[Fields], Model]] = {}
