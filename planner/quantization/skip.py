"""Which modules a quantiser leaves alone, by the rule of transformers' own quantisers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from planner.errors import ConfigError, shown

MAX_PATTERN = 300
OUTPUT = ("lm_head",)
"""What transformers leaves alone where a config names nothing (get_keys_to_not_convert)."""


def skip_patterns(
    config: Mapping[str, Any], *names: str, default: tuple[str, ...] = OUTPUT
) -> tuple[str, ...]:
    """The list in the first of the fields `names` that is there; `default` where none is."""
    for name in names:
        given = config.get(name)
        if given is None:
            continue
        if not isinstance(given, list) or not all(isinstance(word, str) for word in given):
            raise ConfigError(
                f"quantization_config.{name}={shown(given)} is not allowed: a list of module names"
            )
        for word in given:
            try:
                re.compile(word[: MAX_PATTERN + 1])
            except (re.error, RecursionError):
                raise ConfigError(
                    f"quantization_config.{name} has {shown(word)}: a name or a regular expression"
                ) from None
            if len(word) > MAX_PATTERN:
                raise ConfigError(
                    f"quantization_config.{name} has {shown(word)}: ≤ {MAX_PATTERN} characters"
                )
        return tuple(given)
    return default


def is_skipped(module: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern is the module's beginning up to a dot, such a regex, or its end.

    quantizers_utils.should_convert_module, transformers 5.23.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(
        re.match(rf"(?:{key}){boundary}", module) or module.endswith(key) for key in patterns
    )
