"""torchao 0.18: int4, int8 and float8 weights by the tensor subclasses of its version-2 configs.

Named as its safetensors support flattens them; routed experts, no nn.Linear, stay as they are, but
where a runtime quantises them in its own way (`TorchAO.experts`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import ConfigError, check_choice, check_size, shown
from planner.quantization.base import Quantization, Stored, plain
from planner.quantization.skip import is_skipped, skip_patterns
from planner.tensors import Parameter

TYPES = (
    "Int4WeightOnlyConfig",
    "Int8WeightOnlyConfig",
    "Int8DynamicActivationInt8WeightConfig",
    "Float8WeightOnlyConfig",
    "Float8DynamicActivationFloat8WeightConfig",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchAO(Quantization):
    """`quant_type` and what its scales are of: a row, the tensor, or `group_size` in a row.

    Weights that a kernel cannot take stay: int4 where groups do not divide the row, float8 with
    float8 activations where a side is no multiple of 16. `experts`: int8 experts too, a scale for
    each row of each in the model's dtype (gpt-fast, mixtral-moe/quantize.py).
    """

    quant_type: str
    granularity: str
    group_size: int | None
    modules_to_not_convert: tuple[str, ...]
    experts: bool = False

    @property
    def method(self) -> str:
        """`quant_method` as config.json writes it."""
        return "torchao"

    def stored(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        """`_weight_qdata`, `_weight_scale` and, of integers, `_weight_zero_point`."""
        if self.experts and parameter.group == "experts" and len(parameter.shape) == 3:
            E, out, into = parameter.shape
            out = into if parameter.transposed else out
            yield Stored(name=parameter.name, dtype="int8", shape=parameter.shape)
            yield Stored(name=f"{parameter.name}_scale", dtype=dtype, shape=(E, out), role="scale")
            return
        # transformers matches the whole name, so that `mlp.up_proj` alone skips nothing
        skipped = parameter.transposed or is_skipped(parameter.name, self.modules_to_not_convert)
        if not parameter.linear or skipped or not self._takes(*parameter.shape):
            yield plain(parameter, dtype)
            return
        out, into = parameter.shape
        module = parameter.name.removesuffix(".weight")
        if self.group_size is not None and into % self.group_size:
            raise ConfigError(
                f"quantization_config.quant_type.group_size={self.group_size} does not divide "
                f"the {into} columns of {module}"
            )
        int4, int8 = self.quant_type.startswith("Int4"), self.quant_type.startswith("Int8")
        kept, shape = (
            ("int8", (out, into // 2)) if int4 else ("int8" if int8 else "fp8", (out, into))
        )
        columns = {"row": (out, 1), "tensor": (1, 1)}.get(self.granularity)
        scales = columns or (out, into // (self.group_size or into))
        # int4 alone has a group in each row of scales, and scales in the model's dtype
        scales = scales[::-1] if int4 else scales
        yield Stored(name=f"{module}._weight_qdata", dtype=kept, shape=shape)
        yield Stored(
            name=f"{module}._weight_scale",
            dtype=dtype if int4 else "fp32",
            shape=scales,
            role="scale",
        )
        if int4 or int8:
            yield Stored(
                name=f"{module}._weight_zero_point",
                dtype=dtype if int4 else "int8",
                shape=scales,
                role="zero point",
            )

    def _takes(self, out: int, into: int) -> bool:
        match self.quant_type:
            case "Int4WeightOnlyConfig":
                return not into % (self.group_size or into)
            case "Float8DynamicActivationFloat8WeightConfig":
                return not (out % 16 or into % 16)
        return True


def read_torchao(config: Mapping[str, Any]) -> Quantization:
    """TorchAoConfig, whose quant_type is {"default": a config as torchao writes it}."""
    where = "quantization_config.quant_type"
    outer = config.get("quant_type")
    given = outer.get("default") if isinstance(outer, Mapping) and len(outer) == 1 else None
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}={shown(outer)} is not read: an object with default")
    kind = check_choice(f"{where}._type", given.get("_type"), TYPES)
    if given.get("_version", 1) != 2:
        raise ConfigError(f"{where}._version={shown(given.get('_version', 1))} is not read: 2")
    data = given.get("_data", {})
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where}._data={shown(data)} is not allowed: an object")
    for name in ("include_input_output_embeddings", "untie_embedding_weights"):
        if config.get(name):
            raise ConfigError(f"quantization_config.{name}={shown(config[name])} is not read yet")
    for name, allowed in (
        ("packing_format", "PLAIN"),
        ("int4_packing_format", "PLAIN"),
        ("weight_dtype", "float8_e4m3fn"),
    ):
        value = data.get(name, allowed)
        value = value.get("_data") if isinstance(value, Mapping) else value
        if not isinstance(value, str) or value.upper() != allowed.upper():
            raise ConfigError(f"{where}.{name}={shown(data[name])} is not read yet: {allowed}")
    granularity, size = _granularity(where, kind, data)
    return TorchAO(
        quant_type=kind,
        granularity=granularity,
        group_size=size,
        modules_to_not_convert=skip_patterns(config, "modules_to_not_convert"),
    )


def _granularity(where: str, kind: str, data: Mapping[str, Any]) -> tuple[str, int | None]:
    """That of the weights: the second of two where activations have their own."""
    if kind == "Int4WeightOnlyConfig":
        return "group", check_size(f"{where}.group_size", data.get("group_size", 128), minimum=2)
    if data.get("group_size") is not None:
        raise ConfigError(f"{where}.group_size={shown(data['group_size'])} is not allowed: null")
    dynamic_float = kind == "Float8DynamicActivationFloat8WeightConfig"
    given = data.get("granularity")
    if isinstance(given, list) and len(given) == 2:
        given = given[1]
    if given is None:
        return ("tensor" if dynamic_float else "row"), None
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}.granularity={shown(given)} is not allowed: an object")
    words = {"PerRow": "row", "PerTensor": "tensor"}
    if "Dynamic" not in kind:
        words["PerGroup"] = "group"
    word = words[check_choice(f"{where}.granularity", given.get("_type"), words)]
    inner = given.get("_data") or {}
    if not isinstance(inner, Mapping) or inner.get("dim", -1) != -1:
        raise ConfigError(f"{where}.granularity={shown(given)} is not read: rows, dim -1")
    if word != "group":
        return word, None
    return word, check_size(f"{where}.granularity.group_size", inner.get("group_size"))


METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {"torchao": read_torchao}
