"""A language model inside a wrapper's config: its fields, and the wrapper's model around it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from planner.errors import ConfigError, shown
from planner.huggingface.fields import Fields
from planner.model import Model, Tower

OUTSIDE = ("architectures", "dtype", "torch_dtype", "quantization_config", "_name_or_path")
"""What a wrapper's config says for the language model inside it too."""

Names = tuple[tuple[str, str], ...]
TEXT_NAMES: Names = (
    ("embed_tokens", "model.language_model.embed_tokens"),
    ("layers", "model.language_model.layers"),
    ("norm", "model.language_model.norm"),
)


def part(fields: Fields, name: str) -> Mapping[str, Any] | None:
    """A nested config; None where it is null or absent."""
    value = fields.raw(name)
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"{name}={shown(value)} is not allowed: an object or null")
    return value


def text_fields(fields: Fields, given: Mapping[str, Any], model_type: str) -> Fields:
    """The fields of the language model; head, dtype and tying are the wrapper's."""
    inner = {k: v for k, v in given.items() if k != "architectures"}
    outside = {k: fields.config[k] for k in OUTSIDE if fields.config.get(k) is not None}
    if "dtype" in outside or "torch_dtype" in outside:
        inner.pop("dtype", None)
        inner.pop("torch_dtype", None)
    tied = {"tie_word_embeddings": fields.flag("tie_word_embeddings")}
    return Fields({**inner, **outside, **tied}, model_type)


def wrapped(
    fields: Fields, text: Model, *, towers: tuple[Tower, ...], others: Iterable[Fields]
) -> Model:
    """The wrapper's model; `towers` have the names of the model with a head."""
    if not text.lm_head:
        towers = tuple(_bare(tower) for tower in towers)
    taken = [default for inner in (fields, *others) for default in inner.defaults]
    try:
        config_json = json.dumps(dict(fields.config), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config is not plain JSON: {error}") from None
    return replace(
        text,
        name=fields.model_type if text.name == text.model_type else text.name,
        model_type=fields.model_type,
        text_type=text.model_type,
        towers=towers,
        defaults=tuple(sorted({*text.defaults, *taken})),
        config_json=config_json,
    )


def _bare(tower: Tower) -> Tower:
    """The tower of the model without a head, whose names have no `model.` before them."""

    def short(name: str) -> str:
        return name.removeprefix("model.")

    return replace(
        tower,
        outer=tuple(replace(p, name=short(p.name)) for p in tower.outer),
        parameter_names=tuple((ours, short(theirs)) for ours, theirs in tower.parameter_names),
    )
