"""Configs with configs inside: a language model that towers and projectors stand beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from planner.errors import ConfigError, shown
from planner.huggingface.fields import Fields, class_defaults


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
