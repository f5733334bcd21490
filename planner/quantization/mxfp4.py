"""MXFP4 (OCP microscaling formats 1.0): gpt-oss's experts, 32 values of 4 bits to a scale byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.quantization.base import Quantization, Stored, plain
from planner.quantization.skip import is_skipped, skip_patterns
from planner.tensors import Parameter

BLOCK = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Mxfp4(Quantization):
    """Routed experts alone: `…_blocks` [E, out, in / 32, 16] of bytes, `…_scales` of exponents."""

    modules_to_not_convert: tuple[str, ...]

    @property
    def method(self) -> str:
        """`quant_method` as config.json writes it."""
        return "mxfp4"

    def stored(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        """Two values in a byte; the experts' biases stay as they are."""
        module = parameter.name.rpartition(".")[0]
        expert = parameter.group == "experts" and len(parameter.shape) == 3
        if not expert or is_skipped(module, self.modules_to_not_convert):
            yield plain(parameter, dtype)
            return
        E, into, out = parameter.shape  # gpt-oss keeps [E, in, out], its packed form [E, out, in]
        groups = -(-into // BLOCK)
        yield Stored(
            name=f"{parameter.name}_blocks", dtype="uint8", shape=(E, out, groups, BLOCK // 2)
        )
        yield Stored(
            name=f"{parameter.name}_scales", dtype="uint8", shape=(E, out, groups), role="scale"
        )


def read_mxfp4(config: Mapping[str, Any]) -> Quantization:
    """Mxfp4Config."""
    return Mxfp4(modules_to_not_convert=skip_patterns(config, "modules_to_not_convert"))


METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {"mxfp4": read_mxfp4}
