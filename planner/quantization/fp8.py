"""fp8 weights: blocks with a scale each (DeepSeek-V3, arXiv:2412.19437), or one scale a tensor.

As FP8Linear and FP8Experts of transformers 5.23 keep them (integrations/finegrained_fp8.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from planner.errors import ConfigError, check_choice, check_size, shown
from planner.quantization.base import Linear, Quantization, Stored, linears, plain
from planner.quantization.skip import is_skipped, skip_patterns
from planner.tensors import Parameter


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockFp8(Quantization):
    """One byte a weight and, for each `weight_block_size` block (None: the tensor), one scale.

    `scale_fmt` "ue8m0": one-byte exponents (DeepSeek-V3.1 and V4), not float32. `expert_dtype`
    "fp4": two weights of routed experts in a byte, one scale for 32 in a row. "static" activations
    have a float32 scale for each layer.
    """

    weight_block_size: tuple[int, int] | None
    activation_scheme: Literal["dynamic", "static"]
    scale_fmt: Literal["float", "ue8m0"]
    expert_dtype: Literal["fp8", "fp4"]
    modules_to_not_convert: tuple[str, ...]

    @property
    def method(self) -> str:
        """`quant_method` as config.json writes it."""
        return "fp8"

    def stored(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        """`weight` in fp8 beside `weight_scale_inv`."""
        # Conv1D is no nn.Linear, and llama4's and phimoe's routers are subclasses of it
        apart = parameter.transposed and parameter.linear
        apart = apart or parameter.name.endswith(".router.weight")
        layers = () if apart else linears(parameter)
        found = [x for x in layers if not is_skipped(x.module, self.modules_to_not_convert)]
        if not found:
            yield plain(parameter, dtype)
        for linear in found:
            yield from self._linear(linear, fp4=linear.copies > 1 and self.expert_dtype == "fp4")

    def _linear(self, linear: Linear, *, fp4: bool) -> Iterator[Stored]:
        out, into, copies = linear.out, linear.into, linear.copies
        yield Stored(
            name=f"{linear.module}.weight",
            dtype="int8" if fp4 else "fp8",
            shape=(out, into // 2 if fp4 else into),
            copies=copies,
        )
        rows, columns = (1, 32) if fp4 else self.weight_block_size or (out, into)
        whole = self.weight_block_size is None and not fp4
        yield Stored(
            name=f"{linear.module}.weight_scale_inv",
            dtype="uint8" if self.scale_fmt == "ue8m0" and not whole else "fp32",
            shape=() if whole else (-(-out // rows), -(-into // columns)),
            role="scale",
            copies=copies,
        )
        if self.activation_scheme == "static":
            yield Stored(
                name=f"{linear.module}.activation_scale",
                dtype="fp32",
                shape=(),
                role="scale",
                copies=copies,
            )


def read_fp8(config: Mapping[str, Any]) -> Quantization:
    """FineGrainedFP8Config; minimax calls the list of skipped modules `ignored_layers`."""
    block = config.get("weight_block_size", (128, 128))
    if block is not None:
        if not isinstance(block, list | tuple) or len(block) != 2:
            raise ConfigError(
                f"quantization_config.weight_block_size={shown(block)} is not allowed: two sizes"
            )
        rows, columns = (
            check_size("quantization_config.weight_block_size", size) for size in block
        )
        block = (rows, columns)

    def choice(name: str, default: str, allowed: tuple[str, ...]) -> Any:
        value = config.get(name, default)
        lower = value.lower() if isinstance(value, str) else value
        return check_choice(f"quantization_config.{name}", lower, allowed)

    if config.get("modules_to_convert"):
        raise ConfigError(
            f"quantization_config.modules_to_convert={shown(config['modules_to_convert'])} is not "
            "read yet: null"
        )
    return BlockFp8(
        weight_block_size=block,
        activation_scheme=choice("activation_scheme", "dynamic", ("dynamic", "static")),
        scale_fmt=choice("scale_fmt", "float", ("float", "ue8m0")),
        expert_dtype=choice("expert_dtype", "fp8", ("fp8", "fp4")),
        modules_to_not_convert=skip_patterns(config, "modules_to_not_convert", "ignored_layers"),
    )


METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {"fp8": read_fp8}
