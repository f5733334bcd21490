"""Readers of text encoders: BERT and its relatives, deberta, modernbert."""

from __future__ import annotations

from collections.abc import Callable

from planner.huggingface import bert_like, bert_relatives, deberta, modernbert
from planner.huggingface.fields import Fields
from planner.model import Model

READERS: dict[str, Callable[[Fields], Model]] = {
    **bert_like.READERS,
    **bert_relatives.READERS,
    **deberta.READERS,
    **modernbert.READERS,
}
