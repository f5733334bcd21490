"""A quantised GGUF file: how many tensors of each ggml type it has, and their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import MAX_SIZE, ConfigError, check_size, shown
from planner.quantization.base import Quantization, Stored
from planner.tensors import Parameter

MAX_BYTES = MAX_SIZE**2


@dataclass(frozen=True, kw_only=True, slots=True)
class Gguf(Quantization):
    """Blocks of ggml. `held`: (type, tensors, bytes of them) as the file's header has it.

    Which tensor is of which type is a matter of each file, so that `stored` cannot say it; a
    runtime that keeps the blocks as they are (llama.cpp) holds what the file holds.
    """

    held: tuple[tuple[str, int, int], ...] = ()

    @property
    def method(self) -> str:
        """`quant_method` as planner.huggingface.gguf writes it."""
        return "gguf"

    def stored(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        """ConfigError: the config of a GGUF file does not say how its tensors lie."""
        raise ConfigError(
            "quantization_config.quant_method='gguf' is not planned tensor by tensor: "
            "read_checkpoint counts the file's, and runtime='llama.cpp' holds them as they are"
        )


def read_gguf_quantization(config: Mapping[str, Any]) -> Quantization:
    """`tensors`: {type: [tensors, bytes]}, written from the header of a file."""
    tensors = config.get("tensors", {})
    if not isinstance(tensors, Mapping):
        raise ConfigError(f"quantization_config.tensors={shown(tensors)} is not allowed: an object")
    held = []
    for kind, sizes in tensors.items():
        name = f"quantization_config.tensors.{kind}"
        if not isinstance(sizes, list | tuple) or len(sizes) != 2:
            raise ConfigError(f"{name}={shown(sizes)} is not allowed: [tensors, bytes]")
        count, size_bytes = sizes
        held.append(
            (str(kind), check_size(name, count), check_size(name, size_bytes, maximum=MAX_BYTES))
        )
    return Gguf(held=tuple(held))


METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {"gguf": read_gguf_quantization}
