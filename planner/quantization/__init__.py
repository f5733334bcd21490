"""quantization_config → how the weights lie: a reader for each quant_method; others are refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from planner.errors import ConfigError, shown
from planner.quantization import (
    awq,
    bitsandbytes,
    compressed,
    fp8,
    gguf,
    gptq,
    hqq,
    mxfp4,
    quanto,
    torchao,
)
from planner.quantization.base import Quantization, Stored

METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {
    **awq.METHODS,
    **bitsandbytes.METHODS,
    **compressed.METHODS,
    **fp8.METHODS,
    **gguf.METHODS,
    **gptq.METHODS,
    **hqq.METHODS,
    **mxfp4.METHODS,
    **quanto.METHODS,
    **torchao.METHODS,
}
"""The reader of every quant_method that is known."""

__all__ = ["METHODS", "Quantization", "Stored", "read_quantization"]


def read_quantization(config: Any) -> Quantization | None:
    """The Quantization that a config.json names; None without one.

    Raises ConfigError for a method that is not known and for settings that it does not allow.
    """
    if config is None:
        return None
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if not isinstance(method, str):
        raise ConfigError(
            f"quantization_config={shown(config)} is not allowed: an object with quant_method"
        )
    if method not in METHODS:
        known = ", ".join(sorted(METHODS)) or "none"
        raise ConfigError(f"quantization_config.quant_method={shown(method)} is not known: {known}")
    return METHODS[method](config)
