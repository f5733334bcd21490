"""config_groups of compressed-tensors: to which modules a scheme applies, what it says of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from planner.errors import ConfigError, check_choice, check_size, shown
from planner.quantization.base import Stored, groups
from planner.quantization.skip import skip_patterns

STRATEGIES = ("tensor", "channel", "group", "block", "token", "tensor_group", "attn_head")
BITS: dict[str, dict[str, tuple[int, ...]]] = {
    "pack-quantized": {"int": tuple(range(1, 9))},
    "int-quantized": {"int": tuple(range(1, 9))},
    "float-quantized": {"float": (8,)},
    "naive-quantized": {"int": tuple(range(1, 9)), "float": (8,)},
    "nvfp4-pack-quantized": {"float": (4,)},
    "mxfp4-pack-quantized": {"float": (4,)},
    "mxfp8-quantized": {"float": (8,)},
}
"""The formats that are reproduced, and the types and bits of the weights that each one packs."""

GROUP_SIZES = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32, "mxfp8-quantized": 32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Args:
    """QuantizationArgs: how weights or activations become numbers of `num_bits`.

    `dynamic` "local": one scale for all groups is kept, those of the groups are made on the fly.
    """

    num_bits: int
    type: str
    symmetric: bool
    strategy: str
    group_size: int | None
    block_structure: tuple[int, int] | None
    dynamic: bool | str
    g_idx: bool

    @property
    def dtype(self) -> str:
        """Of a value, and of a zero point that is not packed."""
        return "int8" if self.type == "int" else "fp8"

    def scale_shape(self, *observed: int) -> tuple[int, ...]:
        """Of the scales of a tensor whose last sizes are `observed`."""
        match self.strategy:
            case "tensor":
                return (1,)
            case "channel":
                return (observed[-2], 1)
            case "block":
                assert self.block_structure is not None
                rows, columns = self.block_structure
                return (-(-observed[-2] // rows), -(-observed[-1] // columns))
        assert self.group_size is not None
        return (*observed[:-1], groups(observed[-1], self.group_size))

    def scales(self, base: str, *observed: int, dtype: str, copies: int) -> Iterator[Stored]:
        """What static activations add to a module: `…_scale` and its companions."""
        if self.dynamic is True:
            return
        if self.strategy == "tensor_group":
            yield scale(f"{base}_global_scale", "fp32", (1,), copies)
        if self.dynamic == "local":
            return
        shape = self.scale_shape(*observed)
        yield scale(f"{base}_scale", dtype, shape, copies)
        if not self.symmetric:
            name = f"{base}_zero_point"
            yield Stored(name=name, dtype=self.dtype, shape=shape, role="zero point", copies=copies)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """One of config_groups."""

    targets: tuple[str, ...]
    format: str
    weights: Args
    input_activations: Args | None
    output_activations: Args | None


def scale(name: str, dtype: str, shape: tuple[int, ...], copies: int) -> Stored:
    """A tensor of scales."""
    return Stored(name=name, dtype=dtype, shape=shape, role="scale", copies=copies)


def matched(module: str, kind: str, target: str) -> bool:
    """Whether a target is the module's name, its class, or "re:" and a regex of its beginning."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in (module, kind, "Module")


def read_scheme(where: str, group: Any, format_: Any) -> Scheme:
    """A group; `format_` is that of the whole config, where the group names none."""
    if not isinstance(group, Mapping):
        raise ConfigError(f"{where}={shown(group)} is not read yet: an object with targets")
    if group.get("targets") is None or not (targets := skip_patterns(group, "targets")):
        raise ConfigError(f"{where}.targets={shown(group.get('targets'))} is not allowed: names")
    format_ = check_choice(f"{where}.format", group.get("format") or format_, BITS)
    if group.get("weights") is None:
        raise ConfigError(f"{where}.weights=None is not read yet: an object with num_bits")
    weights = read_args(f"{where}.weights", group["weights"])
    check_choice(f"{where}.weights.type", weights.type, BITS[format_])
    bits = BITS[format_][weights.type]
    if weights.num_bits not in bits:
        raise ConfigError(
            f"{where}.weights.num_bits={weights.num_bits} is not allowed in {format_}: "
            f"{', '.join(map(str, bits))}"
        )
    if weights.dynamic is not False or weights.strategy in ("token", "attn_head"):
        raise ConfigError(
            f"{where}.weights.dynamic={shown(weights.dynamic)}, strategy={weights.strategy!r} is "
            "not allowed for weights: static ones by tensor, channel, group or block"
        )
    size = GROUP_SIZES.get(format_, weights.group_size)
    if weights.group_size != size or (weights.strategy == "tensor_group") != ("nvfp4" in format_):
        raise ConfigError(
            f"{where}.weights.strategy={weights.strategy!r}, group_size={weights.group_size} is "
            f"not read in {format_}"
        )
    return Scheme(
        targets=targets,
        format=format_,
        weights=weights,
        input_activations=read_activations(f"{where}.input_activations", group),
        output_activations=read_activations(f"{where}.output_activations", group),
    )


def read_activations(where: str, group: Mapping[str, Any]) -> Args | None:
    """Those of a group or of a KV cache; None: not quantised."""
    given = group.get(where.rpartition(".")[2])
    if given is None:
        return None
    args = read_args(where, given)
    if args.strategy in ("block", "channel", "attn_head"):
        raise ConfigError(
            f"{where}.strategy={args.strategy!r} is not read: tensor, token, group, tensor_group"
        )
    if args.strategy == "token" and args.dynamic is False:
        raise ConfigError(f"{where}.dynamic=False is not allowed with strategy='token': true")
    return args


def read_args(where: str, given: Any) -> Args:
    """QuantizationArgs of compressed-tensors 0.20, with its defaults."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}={shown(given)} is not allowed: an object")
    size, block = given.get("group_size"), given.get("block_structure")
    if size is not None and size != -1:
        check_size(f"{where}.group_size", size)
    implied = {None: "tensor", -1: "channel"}.get(size, "group")
    strategy = given.get("strategy") or implied
    strategy = strategy.lower() if isinstance(strategy, str) else strategy
    check_choice(f"{where}.strategy", strategy, STRATEGIES)
    grouped = strategy in ("group", "tensor_group")
    if grouped != (size is not None and size > 0):
        raise ConfigError(
            f"{where}.group_size={shown(size)} is not allowed with strategy={strategy!r}"
        )
    if (strategy == "block") != (block is not None):
        raise ConfigError(
            f"{where}.block_structure={shown(block)} is not allowed with strategy={strategy!r}"
        )
    dynamic = given.get("dynamic", False)
    if not isinstance(dynamic, bool) and (dynamic, strategy) != ("local", "tensor_group"):
        raise ConfigError(
            f"{where}.dynamic={shown(dynamic)} is not allowed: true, false, "
            "or 'local' with strategy='tensor_group'"
        )
    symmetric = given.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise ConfigError(f"{where}.symmetric={shown(symmetric)} is not allowed: true or false")
    order = given.get("actorder") or "none"
    order = "group" if order is True else order
    check_choice(f"{where}.actorder", order, ("none", "weight", "static", "group", "dynamic"))
    kind = given.get("type", "int")
    check_choice(f"{where}.type", kind.lower() if isinstance(kind, str) else kind, ("int", "float"))
    return Args(
        num_bits=check_size(f"{where}.num_bits", given.get("num_bits", 8), maximum=16),
        type=kind.lower(),
        symmetric=symmetric,
        strategy=strategy,
        group_size=size if grouped else None,
        block_structure=None if block is None else _block(f"{where}.block_structure", block),
        dynamic=dynamic,
        g_idx=grouped and order in ("group", "dynamic"),
    )


def _block(where: str, given: Any) -> tuple[int, int]:
    """[rows, columns]; older files write "128x128"."""
    if isinstance(given, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", given):
        given = [int(size) for size in given.split("x")]
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise ConfigError(f"{where}={shown(given)} is not allowed: two sizes")
    rows, columns = (check_size(where, size) for size in given)
    return rows, columns
