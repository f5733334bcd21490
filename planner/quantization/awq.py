"""AWQ (arXiv:2306.00978) as AutoAWQ stores it: 4 bits, eight to a word of 32 bits.

Linear layers of the blocks, those of routed experts each by itself; what the list names stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planner.errors import ConfigError, check_choice, check_size, shown
from planner.quantization.base import Linear, Quantization, Stored, linears, plain
from planner.quantization.skip import is_skipped, skip_patterns
from planner.tensors import Parameter

PACK = 8
"""Values in a word."""
PADDED = {64: 2, 32: 4}
"""GEMV: multiples that the words of zero points in a row are padded to; 1 from 128 on."""
SCALED = ("dense_h_to_4h", "mlp.c_fc", "mlp.fc_in", "ffn.up_proj")
"""Layers before an activation that AWQ gives scales of its own (falcon, bloom, starcoder2, …)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Awq(Quantization):
    """`qweight`, `qzeros` and `scales` for each layer.

    "gemm" packs along the outputs, [in, out / 8]; "gemv" along the inputs, [out, in / 8], and pads
    the groups of a row to whole words.
    """

    group_size: int
    version: Literal["gemm", "gemv"]
    modules_to_not_convert: tuple[str, ...]

    @property
    def method(self) -> str:
        """`quant_method` as config.json writes it."""
        return "awq"

    def stored(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        """The packed layer, or the parameter as it is."""
        found = linears(parameter) if self._eligible(parameter) else ()
        chosen = [(linear, self._packed(linear)) for linear in found]
        if not any(packed[True] for _, packed in chosen):
            yield plain(parameter, dtype)
            return
        for linear, packed in chosen:
            name, copies = linear.module, packed[True]
            if copies:
                if name.endswith(SCALED):
                    raise ConfigError(
                        f"quantization_config.quant_method=awq is not read yet for {name}: a layer "
                        "without an activation of its own scales"
                    )
                self._check(linear)
                yield from self._layer(linear, copies)
            if packed[False]:
                shape = (linear.out, linear.into)
                yield Stored(name=f"{name}.weight", dtype=dtype, shape=shape, copies=packed[False])

    def _eligible(self, parameter: Parameter) -> bool:
        outside = parameter.layer is None or parameter.group == "router"
        return not outside and not parameter.transposed

    def _packed(self, linear: Linear) -> Counter[bool]:
        """How many copies of a layer are packed, and how many stay."""
        if not self.modules_to_not_convert or "*" not in linear.module:
            return Counter({not self._stays(linear.module): linear.copies})
        names = (linear.module.replace("*", str(e)) for e in range(linear.copies))
        return Counter(not self._stays(name) for name in names)

    def _stays(self, module: str) -> bool:
        """AutoAWQ leaves alone what a word of the list is a part of, transformers by its rule."""
        words = self.modules_to_not_convert
        return any(word in module for word in words) or is_skipped(module, words)

    def _check(self, linear: Linear) -> None:
        size = linear.into if self.group_size == -1 else self.group_size
        multiple = PACK if self.version == "gemv" else 1
        narrow = self.version == "gemv" and size < 128 and size not in PADDED
        if narrow or linear.into % size or linear.into % multiple or linear.out % PACK:
            raise ConfigError(
                f"quantization_config.group_size={self.group_size} is not allowed for "
                f"{linear.module} of {linear.into} inputs and {linear.out} outputs: groups that "
                f"divide the inputs (gemv: of 32, 64 or ≥ 128), outputs a multiple of {PACK}"
            )

    def _layer(self, linear: Linear, copies: int) -> Iterator[Stored]:
        out, into = linear.out, linear.into
        size = into if self.group_size == -1 else self.group_size
        groups = into // size
        if self.version == "gemm":
            weights, zeros, scales = (into, out // PACK), (groups, out // PACK), (groups, out)
        else:
            words, multiple = -(-groups // PACK), PADDED.get(size, 1)
            words = -(-words // multiple) * multiple
            weights, zeros, scales = (out, into // PACK), (out, words), (out, words * PACK)
        module = linear.module
        yield Stored(name=f"{module}.qweight", dtype="int32", shape=weights, copies=copies)
        yield Stored(
            name=f"{module}.qzeros", dtype="int32", shape=zeros, role="zero point", copies=copies
        )
        yield Stored(
            name=f"{module}.scales", dtype="fp16", shape=scales, role="scale", copies=copies
        )


def read_awq(config: Mapping[str, Any]) -> Quantization:
    """AwqConfig, and the names that AutoAWQ's own quant_config.json has for the same."""
    field = "quantization_config"

    def value(*names: str, default: Any) -> Any:
        given = (config[name] for name in names if config.get(name) is not None)
        return next(given, default)

    bits = value("bits", "w_bit", default=4)
    if type(bits) is not int or bits != 4:
        raise ConfigError(f"{field}.bits={shown(bits)} is not allowed: 4")
    zero_point = value("zero_point", default=True)
    if zero_point is not True:
        raise ConfigError(f"{field}.zero_point={shown(zero_point)} is not read yet: true")
    if value("backend", default="autoawq") == "llm-awq":
        raise ConfigError(f"{field}.backend='llm-awq' is not read yet: autoawq")
    version: Any = value("version", "format", default="gemm")
    version = version.lower() if isinstance(version, str) else version
    check_choice(f"{field}.version", version, ("gemm", "gemv"))
    size = value("group_size", "q_group_size", default=128)
    if size != -1:
        check_size(f"{field}.group_size", size)
    return Awq(
        group_size=size,
        version=version,
        modules_to_not_convert=skip_patterns(config, "modules_to_not_convert", default=()),
    )


METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {"awq": read_awq}
