"""optimum-quanto 0.2.7, as transformers makes it of each linear layer on loading (QLinear).

Routed experts are no nn.Linear in transformers 5 and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planner.errors import ConfigError, check_choice, shown
from planner.quantization.base import Quantization, Stored, plain
from planner.quantization.skip import is_skipped, skip_patterns
from planner.tensors import Parameter

BITS = {"int2": 2, "int4": 4}


@dataclass(frozen=True, kw_only=True, slots=True)
class Quanto(Quantization):
    """8 bits: a scale for each row. Fewer: packed along the rows, with a scale and a shift each.

    Every layer keeps two scales of activations too, in float32, used or not.
    """

    weights: Literal["int8", "int4", "int2", "float8"]
    modules_to_not_convert: tuple[str, ...]

    @property
    def method(self) -> str:
        """`quant_method` as config.json writes it."""
        return "quanto"

    def stored(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        """`weight._data`, `weight._scale`, `weight._shift`, `input_scale`, `output_scale`."""
        module = parameter.name.removesuffix(".weight")
        skipped = parameter.transposed or is_skipped(module, self.modules_to_not_convert)
        if not parameter.linear or skipped:
            yield plain(parameter, dtype)
            return
        out, into = parameter.shape
        if self.weights in BITS:
            yield from _packed(f"{module}.weight", out, into, BITS[self.weights], dtype)
        else:
            kept = "fp8" if self.weights == "float8" else "int8"
            yield Stored(name=f"{module}.weight._data", dtype=kept, shape=(out, into))
            shape = () if out == 1 else (out, 1)
            yield Stored(name=f"{module}.weight._scale", dtype=dtype, shape=shape, role="scale")
        for side in ("input", "output"):
            yield Stored(name=f"{module}.{side}_scale", dtype="fp32", shape=(), role="scale")


def _packed(name: str, out: int, into: int, bits: int, dtype: str) -> Iterator[Stored]:
    size = group_size(into)
    rows, width = (out, into) if size is None else (out * into // size, size)
    yield Stored(name=f"{name}._data._data", dtype="uint8", shape=(-(-rows * bits // 8), width))
    shape = (1, width) if rows == 1 else (rows, 1)  # one row alone is quantised by column
    yield Stored(name=f"{name}._scale", dtype=dtype, shape=shape, role="scale")
    yield Stored(name=f"{name}._shift", dtype=dtype, shape=shape, role="zero point")


def group_size(into: int) -> int | None:
    """128, 96, 64 or 32 in a row, the first that divides it; None: the row is one group."""
    if into <= 128:
        return None
    return next((size for size in (128, 96, 64, 32) if into % size == 0), None)


def read_quanto(config: Mapping[str, Any]) -> Quantization:
    """QuantoConfig; activations are quantised only by quanto's own calibration."""
    if config.get("activations") is not None:
        raise ConfigError(
            f"quantization_config.activations={shown(config['activations'])} is not loaded by "
            "transformers: null"
        )
    weights: Any = check_choice(
        "quantization_config.weights",
        config.get("weights", "int8"),
        ("int8", "int4", "int2", "float8"),
    )
    return Quanto(
        weights=weights,
        modules_to_not_convert=skip_patterns(config, "modules_to_not_convert"),
    )


METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {"quanto": read_quanto}
