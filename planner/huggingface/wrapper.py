"""Configs with configs inside: a language model that towers and projectors stand beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from planner.errors import ConfigError, shown
from planner.huggingface.blocks import about, rebased, stated_dtype
from planner.huggingface.fields import Fields, class_defaults
from planner.model import Model, Tower, translate

Reader = Callable[[Fields], Model]
TowerReader = Callable[[Fields], Tower]


@contextmanager
def named(name: str) -> Iterator[None]:
    """Refusals from in here say in which part of the config they are."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None


def part(
    fields: Fields,
    name: str,
    model_type: str,
    *,
    only: bool = False,
    absent: Mapping[str, Any] | None = None,
) -> Fields:
    """The config inside `name`, seen through the class of its own model_type or of `model_type`.

    `only`: always the latter, as where transformers names a class. `absent`: what the class takes
    where there is none; transformers 5.23 does so in configuration_utils.SubConfigSpec.
    """
    config = fields.config.get(name)
    if config is None:
        fields.take_default(name, f"{{}} of {model_type}")
        config = absent or {}
    if not isinstance(config, Mapping):
        raise ConfigError(f"{name}={shown(config)} is not allowed: an object or null")
    own = model_type if only else config.get("model_type", model_type)
    if not isinstance(own, str) or own not in class_defaults()["model_types"]:
        raise ConfigError(f"{name}.model_type={shown(own)} is not read yet")
    return fields.part(name, own, config)


def tower_of(
    fields: Fields, towers: Mapping[str, TowerReader], model_type: str, **how: Any
) -> tuple[Tower, Fields]:
    """The tower that `vision_config` describes, and that config; `how` as in `part`."""
    vision = part(fields, "vision_config", model_type, **how)
    with named("vision_config"):
        return _known("vision_config", vision.model_type, towers)(vision), vision


def text_of(fields: Fields, model_type: str, **how: Any) -> tuple[Model, Fields]:
    """The language model that `text_config` describes, as a causal LM, and that config.

    Its own `architectures` say nothing: transformers takes the bare model of its type.
    """
    from planner.huggingface import READERS  # which has the readers of wrappers too

    return text_by(READERS, part(fields, "text_config", model_type, **how), fields)


def text_by(readers: Mapping[str, Reader], text: Fields, fields: Fields) -> tuple[Model, Fields]:
    """The same from a config found otherwise, with one of `readers`."""
    reader = _known("text_config", text.model_type, readers)
    config = {k: v for k, v in text.config.items() if k not in ("architectures", "torch_dtype")}
    config["dtype"] = stated_dtype(fields.config, text.config) or "float32"
    inner = fields.part("text_config", text.model_type, config)
    with named("text_config"):
        model = reader(inner)
        if not model.is_decoder or model.towers or model.embedding_size is not None:
            raise ConfigError(f"model_type={shown(text.model_type)} is not read inside another yet")
    return model, inner


def _known(name: str, model_type: str, readers: Mapping[str, Any]) -> Any:
    if model_type not in readers:
        raise ConfigError(f"{name}.model_type={shown(model_type)} is not read yet")
    return readers[model_type]


def wrapped(
    fields: Fields,
    text: Model,
    *towers: Tower,
    base: str,
    tie: bool,
    head: bool,
    head_name: str = "lm_head",
) -> Model:
    """The language model as the module `base` of the whole, with `towers` beside it.

    `head`: a linear layer `head_name` without a bias on it, tied to the embedding or not; scales
    and caps that the text type's own causal LM has are not applied.
    """
    names = rebased(text.parameter_names, f"{base}.")
    embedding = translate("embed_tokens", names).rpartition(".")[2]
    if head and tie and embedding != "embed_tokens":
        raise ConfigError(
            f"tie_word_embeddings=True is not allowed: {text.model_type} calls its embedding "
            f"{embedding}, and the head is tied to embed_tokens"
        )
    return replace(
        text,
        lm_head=head,
        lm_head_bias=False,
        tie_word_embeddings=tie,
        logit_scale=None,
        final_logit_softcapping=None,
        towers=towers,
        text_type=text.model_type,
        parameter_names=(*(n for n in names if n[0] != "lm_head"), ("lm_head", head_name)),
        **about(fields, fields.config.get("text_config")),
    )
