"""HQQ (half-quadratic quantisation) as HQQLinear of hqq 0.2.8 saves itself.

transformers 5.23 reads and writes HqqConfig but quantises nothing with it yet; routed experts are
no nn.Linear there and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import ConfigError, check_size, shown
from planner.quantization.base import Quantization, Stored, plain
from planner.quantization.skip import skip_patterns
from planner.tensors import Parameter

PACKED = {8: 1, 6: 1, 5: 1, 4: 2, 3: 10, 2: 4, 1: 8}
"""Rows in one row of words by `nbits`: bytes, but of 3 bits ten in an int32."""

FLAGS = (
    *("view_as_float", "quant_scale", "quant_zero", "offload_meta", "encoded_state_dict"),
    *("stores_quant_config", "channel_wise", "optimize", "round_zero"),
)
TORCH_NAMES = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """weight_quant_params; `group_size` None: a whole side."""

    nbits: int
    group_size: int | None
    axis: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HQQ(Quantization):
    """Groups of the flattened weight: rows [−1, group_size] by axis 1, columns by axis 0.

    `quant_config`: one for all layers but `skip_modules`, or one for each named kind of layer
    (`self_attn.q_proj`), where other kinds stay.
    """

    quant_config: Params | tuple[tuple[str, Params], ...]
    skip_modules: tuple[str, ...]

    @property
    def method(self) -> str:
        """`quant_method` as config.json writes it."""
        return "hqq"

    def stored(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        """`W_q`, `scale`, `zero`, and the settings, each a tensor too."""
        module = parameter.name.removesuffix(".weight")
        params = (
            self._params(linear_tag(module))
            if parameter.linear and not parameter.transposed
            else None
        )
        if params is None:
            yield plain(parameter, dtype)
            return
        out, into = parameter.shape
        rows, columns = _grouped(module, params, out, into)
        kept = "int32" if params.nbits == 3 else "uint8"
        words = (-(-rows // PACKED[params.nbits]), columns)
        yield Stored(name=f"{module}.W_q", dtype=kept, shape=words)
        scales = (rows, 1) if params.axis == 1 else (1, columns)
        yield Stored(name=f"{module}.scale", dtype=dtype, shape=scales, role="scale")
        yield Stored(name=f"{module}.zero", dtype=dtype, shape=scales, role="zero point")
        for name, kind, shape in _settings(dtype):
            yield Stored(name=f"{module}.{name}", dtype=kind, shape=shape, role="table")

    def _params(self, tag: str) -> Params | None:
        if isinstance(self.quant_config, Params):
            return None if tag in self.skip_modules else self.quant_config
        return dict(self.quant_config).get(tag)


def linear_tag(module: str) -> str:
    """A module's name without "model", "layers" and numbers (name_to_linear_tag)."""
    words = module.split(".")
    return ".".join(w for w in words if w not in ("model", "layers") and not w.isnumeric())


def _grouped(module: str, params: Params, out: int, into: int) -> tuple[int, int]:
    size = params.group_size or (into if params.axis == 1 else out)
    other, rest = divmod(out * into, size)
    rows, columns = (other, size) if params.axis == 1 else (size, other)
    if rest or (params.nbits != 3 and rows % PACKED[params.nbits]):
        raise ConfigError(
            f"quantization_config.quant_config group_size={size}, nbits={params.nbits} does not "
            f"divide {module}: {out} × {into}"
        )
    return rows, columns


def _settings(dtype: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """As encode_safetensor_type of hqq makes tensors of numbers, truths and words."""
    for name in ("nbits", "group_size", "axis"):
        yield name, "int32", ()
    for name in FLAGS:
        yield name, "uint8", ()
    yield "shape", "int64", (2,)
    yield "packing", "uint8", (len("4bit_u8"),)
    yield "unpack_view_dtype", "uint8", (len("torch.uint8"),)
    yield "compute_dtype", "uint8", (len(TORCH_NAMES[dtype]),)


def read_hqq(config: Mapping[str, Any]) -> Quantization:
    """HqqConfig, with one quant_config or one for each kind of layer (dynamic_config)."""
    where = "quantization_config.quant_config"
    given = config.get("quant_config")
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"{where}={shown(given)} is not allowed: an object")
    made: Params | tuple[tuple[str, Params], ...]
    if "weight_quant_params" in given:
        made = _read_params(where, given)
    else:
        made = tuple((str(tag), _read_params(f"{where}.{tag}", one)) for tag, one in given.items())
    return HQQ(quant_config=made, skip_modules=skip_patterns(config, "skip_modules"))


def _read_params(where: str, given: Any) -> Params:
    weights = given.get("weight_quant_params") if isinstance(given, Mapping) else None
    if not isinstance(weights, Mapping):
        raise ConfigError(f"{where}={shown(given)} is not allowed: weight_quant_params")
    for name in ("scale_quant_params", "zero_quant_params", "offload_meta"):
        if given.get(name):
            raise ConfigError(f"{where}.{name}={shown(given[name])} is not read: hqq ignores it")
    if weights.get("view_as_float"):
        raise ConfigError(f"{where}.view_as_float={shown(weights['view_as_float'])} is not read")
    if weights.get("channel_wise", True) is not True:
        raise ConfigError(f"{where}.channel_wise={shown(weights['channel_wise'])} is not read")
    nbits = check_size(f"{where}.nbits", weights.get("nbits"))
    if nbits not in PACKED:
        raise ConfigError(f"{where}.nbits={nbits} is not allowed: 8, 6, 5, 4, 3, 2, 1")
    size = weights.get("group_size")
    if size is not None and check_size(f"{where}.group_size", size) % 8:
        raise ConfigError(f"{where}.group_size={size} is not allowed: a multiple of 8")
    axis = check_size(f"{where}.axis", weights.get("axis"), minimum=0, maximum=1)
    return Params(nbits=nbits, group_size=size, axis=axis)


METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {"hqq": read_hqq}
