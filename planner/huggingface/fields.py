"""Typed reading of a config.json: aliases, class defaults and one-line refusals in one place."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from planner.errors import MAX_SIZE, ConfigError, check_choice, check_size, shown


@cache
def class_defaults() -> dict[str, Any]:
    """What the config classes of transformers take for absent fields (defaults.json)."""
    text = files("planner.huggingface").joinpath("defaults.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


SAME_AS = {"kimi_k2": "deepseek_v3"}
"""Types of published configs that transformers does not know → the type whose class they name."""


class Fields:
    """A config.json seen through its class: `fields.size("hidden_size")`.

    A field is looked up under its own name and its alias, then in the class defaults; a default
    that was taken is remembered in `defaults`. A field that is present but null is None, not
    absent.
    """

    def __init__(self, config: Mapping[str, Any], model_type: str) -> None:
        self.config = config
        self.model_type = model_type
        self._class = class_defaults()["model_types"][SAME_AS.get(model_type, model_type)]
        self._defaults_taken: set[str] = set()
        self._spelled: dict[str, tuple[str, ...]] = {}
        self._supposed: dict[str, Any] = {}
        self._parts: dict[str, Fields] = {}

    @property
    def defaults(self) -> tuple[str, ...]:
        """`field=value` for every default taken so far, sorted; those of parts come last."""
        inner = (f"{name}.{d}" for name, part in self._parts.items() for d in part.defaults)
        return (*sorted(self._defaults_taken), *inner)

    def part(self, name: str, model_type: str, config: Mapping[str, Any]) -> Fields:
        """A config inside this one, seen through the class of `model_type`."""
        self._parts[name] = Fields(config, model_type)
        return self._parts[name]

    def spell(self, **names: tuple[str, ...]) -> None:
        """From now on look a field up under these names, the first that is there."""
        self._spelled.update(names)

    def suppose(self, **values: Any) -> None:
        """Defaults that the class sets in code, not in its fields."""
        self._supposed.update(values)

    def raw(self, name: str) -> Any:
        """The value of a field, or its class default, or None where the class has no such field."""
        for spelling in self._spellings(name):
            if spelling in self.config:
                return self.config[spelling]
        defaults = {**self._class["fields"], **self._supposed}
        for spelling in self._spellings(name):
            if spelling in defaults:
                default = defaults[spelling]
                if default is not None:
                    self._defaults_taken.add(f"{name}={default}")
                return default
        return None

    def take_default(self, name: str, value: Any) -> None:
        """Remember a default that the class computes and defaults.json cannot hold."""
        self._defaults_taken.add(f"{name}={value}")

    def has(self, name: str) -> bool:
        """Whether the config itself has the field."""
        return any(spelling in self.config for spelling in self._spellings(name))

    def size(self, name: str, *, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """A required size."""
        value = self.raw(name)
        if value is None:
            raise ConfigError(f"{name} is missing from the config: a whole number ≥ {minimum}")
        return check_size(name, value, minimum=minimum, maximum=maximum)

    def optional_size(self, name: str, *, minimum: int = 1) -> int | None:
        """A size, or None where the field is null or absent without a default."""
        value = self.raw(name)
        return None if value is None else check_size(name, value, minimum=minimum)

    def number(self, name: str) -> float:
        """A required finite number above zero."""
        value = self.optional_number(name)
        if value is None:
            raise ConfigError(f"{name} is missing from the config: a number above 0")
        return value

    def optional_number(self, name: str) -> float | None:
        """A finite number above zero, or None."""
        value = self.raw(name)
        return None if value is None else check_positive(name, value)

    def flag(self, name: str) -> bool:
        """A boolean; null counts as false."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(f"{name}={shown(value)} is not allowed: true or false")
        return bool(value)

    def choice(self, name: str, allowed: Iterable[str]) -> str:
        """One of the allowed words."""
        return check_choice(name, self.raw(name), allowed)

    def rope_parameters(self) -> dict[str, Any]:
        """The rotary parameters in today's form, also from `rope_scaling` and `rope_theta`."""
        value = self.raw("rope_scaling") or self.raw("rope_parameters") or {}
        if not isinstance(value, Mapping):
            raise ConfigError(f"rope_parameters={shown(value)} is not allowed: an object or null")
        parameters = dict(value)
        rope_type = parameters.pop("type", None)
        parameters.setdefault("rope_type", rope_type or "default")
        if parameters.get("rope_theta") is None:
            theta = self.raw("rope_theta")
            if theta is None:
                theta = self._class["rope_theta"]
                self._defaults_taken.add(f"rope_theta={theta}")
            parameters["rope_theta"] = theta
        return parameters

    def _spellings(self, name: str) -> tuple[str, ...]:
        if name in self._spelled:
            return self._spelled[name]
        # what the class declares is set first, so the other spelling wins where both are there:
        # mostly the alias, in kimi_linear the name behind it
        aliases: dict[str, str] = self._class["aliases"]
        field = aliases.get(name, name)
        names = (*(ours for ours, theirs in aliases.items() if theirs == field), field)
        return tuple(sorted(names, key=lambda spelling: spelling in self._class["fields"]))


def check_positive(field: str, value: Any) -> float:
    """A finite number above zero; ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{field}={shown(value)} is not allowed: a number above 0")
    if not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{field}={shown(value)} is not allowed: a finite number above 0")
    return float(value)
