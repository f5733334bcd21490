"""A quantised GGUF file: its bytes are counted from its headers (planner.checkpoint), not here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import ConfigError
from planner.quantization.base import Quantization, Stored
from planner.tensors import Parameter


@dataclass(frozen=True, kw_only=True, slots=True)
class Gguf(Quantization):
    """Blocks of ggml, whose kinds are a matter of each tensor and stand in the file alone."""

    @property
    def method(self) -> str:
        """`quant_method` as planner.huggingface.gguf writes it."""
        return "gguf"

    def stored(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        """ConfigError: the config of a GGUF file does not say how its tensors lie."""
        raise ConfigError(
            "quantization_config.quant_method='gguf' is not planned yet: read_checkpoint counts "
            "the file's bytes, and without quantization_config weights are planned in dtype"
        )


def read_gguf_quantization(config: Mapping[str, Any]) -> Quantization:
    """It has no settings."""
    return Gguf()


METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {"gguf": read_gguf_quantization}
