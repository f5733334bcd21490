"""compressed-tensors: pack-, int-, float-quantized, nvfp4, mxfp4, mxfp8, a format for each group.

As compressed_tensors 0.20 compresses a module (compressors/*/base.py), each routed expert one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from planner.errors import ConfigError, check_choice, shown
from planner.quantization.base import Linear, Quantization, Stored, linears, plain
from planner.quantization.compressed_scheme import (
    GROUP_SIZES,
    Args,
    Scheme,
    matched,
    read_activations,
    read_scheme,
    scale,
)
from planner.quantization.skip import skip_patterns
from planner.tensors import Parameter

CACHED = ("k_proj", "qkv_proj", "kv_b_proj")
"""The projections by which an attention is known whose KV cache is quantised."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedTensors(Quantization):
    """A scheme for each module that a group targets and no name in `ignore` spares."""

    config_groups: tuple[Scheme, ...]
    ignore: tuple[str, ...]
    kv_cache_scheme: Args | None

    @property
    def method(self) -> str:
        """`quant_method` as config.json writes it."""
        return "compressed-tensors"

    def stored(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        """The parts of each linear layer or embedding; `k_scale` and `v_scale` beside `k_proj`."""
        found = () if parameter.transposed and parameter.linear else linears(parameter)  # Conv1D
        kind = "Linear"
        if parameter.group == "embedding" and len(parameter.shape) == 2 and not found:
            kind, (rows, width) = "Embedding", parameter.shape
            found = (Linear(module=parameter.name.removesuffix(".weight"), out=rows, into=width),)
        schemes = [(x, _scheme(self, x.module.replace("*", "0"), kind)) for x in found]
        if not any(scheme for _, scheme in schemes):
            yield plain(parameter, dtype)
        else:
            for linear, scheme in schemes:
                yield from _parts(linear, scheme, dtype)
        yield from self._cache_scales(parameter, dtype)

    def _cache_scales(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        attention, _, module = parameter.name.removesuffix(".weight").rpartition(".")
        if self.kv_cache_scheme is None or parameter.group != "attention":
            return
        if module in CACHED and parameter.linear:
            for letter in ("k", "v"):
                yield from self.kv_cache_scheme.scales(
                    f"{attention}.{letter}", dtype=dtype, copies=1
                )


@lru_cache(maxsize=65536)
def _scheme(method: CompressedTensors, module: str, kind: str) -> Scheme | None:
    """By the most telling target: a name, a regex, a class; the last group that lists it."""
    if any(matched(module, kind, word) for word in method.ignore):
        return None
    by_target = {word: group for group in method.config_groups for word in group.targets}
    hits = [word for word in by_target if matched(module, kind, word)]
    hits.sort(key=lambda word: (word in (kind, "Module"), "re:" in word, word))
    return by_target[hits[0]] if hits else None


def _parts(linear: Linear, scheme: Scheme | None, dtype: str) -> Iterator[Stored]:
    module, out, into, copies = linear.module, linear.out, linear.into, linear.copies
    if scheme is None:  # one half of a fused pair of experts is spared
        yield Stored(name=f"{module}.weight", dtype=dtype, shape=(out, into), copies=copies)
        return
    weights = scheme.weights

    def of(name: str, kept: str, *shape: int, role: Any = "weight") -> Stored:
        return Stored(name=f"{module}.{name}", dtype=kept, shape=shape, role=role, copies=copies)

    match scheme.format:
        case "pack-quantized":
            yield of("weight_packed", "int32", out, -(-into * weights.num_bits // 32))
            yield of("weight_shape", "int64", 2, role="table")
        case "nvfp4-pack-quantized" | "mxfp4-pack-quantized":
            if into % GROUP_SIZES[scheme.format]:
                raise ConfigError(
                    f"quantization_config.format='{scheme.format}' does not pack {module}: "
                    f"{into} columns are not a multiple of {GROUP_SIZES[scheme.format]}"
                )
            yield of("weight_packed", "uint8", out, into // 2)
        case _:
            yield of("weight", weights.dtype, out, into)
    shape = weights.scale_shape(out, into)
    if weights.strategy == "tensor_group":
        yield scale(f"{module}.weight_global_scale", "fp32", (1,), copies)
    small = {"nvfp4-pack-quantized": "fp8"}.get(scheme.format, "uint8")
    kept = small if scheme.format in GROUP_SIZES else dtype
    yield scale(f"{module}.weight_scale", kept, shape, copies)
    if not weights.symmetric:
        packed = scheme.format == "pack-quantized" and weights.strategy in ("group", "channel")
        rows = -(-out * weights.num_bits // 32)
        size = (rows, shape[1]) if packed else shape
        yield of(
            "weight_zero_point", "int32" if packed else weights.dtype, *size, role="zero point"
        )
    if weights.g_idx:
        yield of("weight_g_idx", "int32", into, role="index")
    for base, args, width in (
        ("input", scheme.input_activations, into),
        ("output", scheme.output_activations, out),
    ):
        if args is not None:
            yield from args.scales(f"{module}.{base}", width, dtype=dtype, copies=copies)


def read_compressed(config: Mapping[str, Any]) -> Quantization:
    """QuantizationConfig; what prunes or rotates weights beside it is refused."""
    _refuse_others(config)
    given = config.get("config_groups")
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(
            f"quantization_config.config_groups={shown(given)} is not allowed: groups by name"
        )
    ignore = skip_patterns(config, "ignore", default=())
    found = tuple(
        read_scheme(f"quantization_config.config_groups.{name}", group, config.get("format"))
        for name, group in given.items()
    )
    for word in (*ignore, *(word for group in found for word in group.targets)):
        if re.search(r"experts\\?\.\d", word):
            raise ConfigError(
                f"quantization_config has {shown(word)}: a part of the routed experts is not read"
            )
        try:
            re.compile(word.removeprefix("re:"))
        except (re.error, RecursionError):
            raise ConfigError(
                f"quantization_config has {shown(word)}: a name or re: and a regular expression"
            ) from None
    return CompressedTensors(
        config_groups=found, ignore=ignore, kv_cache_scheme=_cache_scheme(config)
    )


def _cache_scheme(config: Mapping[str, Any]) -> Args | None:
    where = "quantization_config.kv_cache_scheme"
    args = read_activations(where, config)
    if args is not None and args.strategy not in ("tensor", "token"):
        raise ConfigError(f"{where}.strategy={args.strategy!r} is not read: tensor, token")
    return args


def _refuse_others(config: Mapping[str, Any]) -> None:
    status = config.get("quantization_status")
    if status is not None:  # files of older versions say "frozen" of compressed weights
        check_choice("quantization_config.quantization_status", status, ("compressed", "frozen"))
    for name in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        given = config.get(name)
        if given and not (isinstance(given, Mapping) and given.get("format") == "dense"):
            raise ConfigError(f"quantization_config.{name}={shown(given)} is not read yet: null")


METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {
    "compressed-tensors": read_compressed
}
