"""Readers of encoder-decoders: T5's family, Bart's copies, whisper."""

from __future__ import annotations

from collections.abc import Callable

from planner.huggingface import bart_like, t5, whisper
from planner.huggingface.fields import Fields
from planner.model import Model

READERS: dict[str, Callable[[Fields], Model]] = {
    **bart_like.READERS,
    **t5.READERS,
    **whisper.READERS,
}
