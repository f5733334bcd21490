"""What a GGUF file of a model holds: the gguf package's own names for the config's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from planner.checkpoints.comparison import Expected, differences
from planner.findings import Finding
from planner.headers.stored import StoredTensor
from planner.model import Model

LATENT = re.compile(r"\.attn_[kv]_b\.weight$")


def compare_gguf(
    model: Model, tensors: Sequence[StoredTensor], architecture: str
) -> Iterator[Finding]:
    """What the file lacks or has more or in another shape than the model. Dtypes are its own."""
    named = [(LATENT.sub(".attn_kv_b.weight", t.name), t) for t in tensors]
    yield from differences(model, named, expected_gguf(model, architecture))


def expected_gguf(model: Model, architecture: str) -> dict[str, Expected]:
    """The tensors by GGUF names, linear weights always [out, in], gate and up of experts apart."""
    names = _name_map(architecture, len(model.layers))
    made: dict[str, Expected] = {}
    for ours, theirs in zip(model.parameters(), model.checkpoint_parameters(), strict=True):
        shape = ours.shape
        if ours.group == "experts" and "gate_up_proj" in ours.name:
            half = _rows_last(model, shape)
            half = (half[0], half[1] // 2, *half[2:])
            for part in ("gate_proj", "up_proj"):
                name = theirs.name.replace("gate_up_proj", part)
                made[_gguf_name(names, name)] = Expected(name=theirs.name, shape=half, dtype=None)
            continue
        if ours.group == "experts":
            shape = _rows_last(model, shape)
        name = _gguf_name(names, theirs.name)
        wanted = Expected(name=theirs.name, shape=shape, dtype=None)
        made[name] = replace(wanted, in_parts=name.endswith(".attn_kv_b.weight"))
    return made


def _rows_last(model: Model, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[experts, out, in] of weights that the model may keep as [experts, in, out]."""
    turned = any(getattr(f, "layout", "") == "transposed" for f in _feed_forwards(model))
    return (shape[0], shape[2], shape[1]) if turned and len(shape) == 3 else shape


def _feed_forwards(model: Model) -> set[Any]:
    return {layer.feed_forward for layer in model.layer_kinds()}


def _name_map(architecture: str, layers: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    word = "llama" if architecture == "mistral" else architecture
    arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == word), None)
    return None if arch is None else get_tensor_name_map(arch, layers)


def _gguf_name(names: Any, name: str) -> str:
    """The GGUF name of a tensor; its own name where the package has none for it."""
    stem, suffix = name, ".weight"
    for ending in (".weight", ".bias", "_bias"):
        if name.endswith(ending):
            stem, suffix = name.removesuffix(ending), ending.replace("_", ".")
            break
    for spelling in (stem, stem.removeprefix("transformer.")):
        known = None if names is None else names.get_name(spelling)
        if known is not None:
            return f"{known}{suffix}"
    return name
