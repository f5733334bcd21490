"""Tensors in the files that the config does not ask for: what they are, and whether it matters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from planner.findings import Finding, listed
from planner.format import gib
from planner.headers.stored import StoredTensor
from planner.layers import MoE
from planner.model import Model

LAYER = re.compile(r"^(?:layers|h|blocks|blk)\.(\d{1,9})\.")
BUFFERS = re.compile(
    r"rotary_emb\.(?:inv_freq|cos_cached|sin_cached)$|rope\.freqs$|position_ids$"
    r"|(?:attn|attention)\.(?:attention\.)?(?:bias|masked_bias)$"
    r"|^rope_(?:freqs|factors_long|factors_short)\.weight$"
)
CORRECTION = re.compile(r"e_score_correction_bias$|exp_probs_b(?:\.bias)?$")
PREDICTS_FURTHER = re.compile(
    r"(?:^|\.)mtp(?:\.|_)|\.nextn\.|\.(?:eh_proj|enorm|hnorm|shared_head)(?:\.|$)"
)
HEADS = re.compile(r"(?:lm_head|output|score|classifier|v_head|qa_outputs|pooler)\.")

EXTRAS: dict[str, tuple[Literal["error", "warning", "note"], str, str]] = {
    "extra-layers": (
        "error",
        "More layers than the config has",
        "The config is of another model, or num_hidden_layers was changed.",
    ),
    "mtp-layers": (
        "note",
        "Layers for multi-token prediction",
        "They are in the files; transformers does not load them, some engines do.",
    ),
    "tied-head": (
        "note",
        "A head is stored although it is tied to the embedding",
        "It takes room in the files, not in memory.",
    ),
    "extra-head": (
        "warning",
        "A head that the config's class does not have",
        "It is not loaded by that class.",
    ),
    "buffers": (
        "note",
        "Buffers that are computed on loading",
        "Older versions and other formats store them; they are no parameters.",
    ),
    "extra-tensors": (
        "warning",
        "Tensors that the config says nothing of",
        "They are not loaded, and not in what is predicted.",
    ),
}
"""Severity, title and consequence of every kind."""


def extras(model: Model, extra: Sequence[tuple[str, StoredTensor]]) -> Iterator[Finding]:
    """One finding for each kind of tensor that is there and not asked for."""
    further = _further_layers(model, [name for name, _ in extra])
    kinds: dict[str, list[StoredTensor]] = {}
    for name, tensor in extra:
        kinds.setdefault(_kind(model, name, tensor, further), []).append(tensor)
    for kind, (severity, title, why) in EXTRAS.items():
        if kind in kinds:
            size = gib(sum(tensor.size_bytes for tensor in kinds[kind]))
            names = [tensor.name for tensor in kinds[kind]]
            yield Finding(
                id=kind,
                severity=severity,
                title=f"{title}: {len(names):,} tensors, {size}",
                seen=listed(names),
                why=why,
            )


def _further_layers(model: Model, names: Sequence[str]) -> set[int]:
    """Layers beyond the config's that predict further tokens: by the config, or by their parts."""
    first, config = len(model.layers), model.config
    stated = config.get("num_nextn_predict_layers", config.get("num_mtp_layers"))
    count = stated if type(stated) is int and 0 < stated < 1000 else 0
    marked = {_layer(name) for name in names if PREDICTS_FURTHER.search(name)}
    return marked | set(range(first, first + count))


def _layer(name: str) -> int:
    layer = LAYER.search(name)
    return int(layer[1]) if layer else -1


def _kind(model: Model, name: str, tensor: StoredTensor, further: set[int]) -> str:
    index = _layer(name)
    if index >= len(model.layers):
        return "mtp-layers" if index in further else "extra-layers"
    if PREDICTS_FURTHER.search(name):
        return "mtp-layers"
    if index >= 0 and CORRECTION.search(name) and isinstance(model.layers[index].feed_forward, MoE):
        return "buffer of the class"  # loaded as it is: nothing to report
    if BUFFERS.search(name):
        return "buffers"
    if HEADS.match(name):
        embedding = (model.vocab_size, model.embedding_size or model.hidden_size)
        tied = model.tie_word_embeddings and model.lm_head and tensor.shape == embedding
        return "tied-head" if tied and name.startswith(("lm_head.", "output.")) else "extra-head"
    return "extra-tensors"
