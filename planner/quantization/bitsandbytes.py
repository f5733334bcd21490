"""bitsandbytes: nf4 and fp4 (arXiv:2305.14314), int8 (arXiv:2208.07339).

As Linear4bit and Linear8bitLt of bitsandbytes 0.50 save them. transformers replaces linear layers
on loading; routed experts are none in its classes and stay as they are.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from planner.errors import ConfigError, check_choice, shown
from planner.quantization.base import (
    STORED_BYTES,
    Linear,
    Quantization,
    Stored,
    groups,
    linears,
    plain,
)
from planner.quantization.replaced import HEADS, KEPT_IN_FP32, left_alone, of_own_class
from planner.quantization.skip import is_skipped, skip_patterns
from planner.tensors import Parameter

BLOCK = 64
NESTED_BLOCK = 256
STORAGE = {
    "uint8": "uint8",
    "int8": "int8",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
}
UNFUSED = ("llama4", "llama4_text")
"""Types whose quantised checkpoints have an expert's matrices apart."""
TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class OnLoading(Quantization):
    """What both have in common: which layers are replaced.

    `by_default`: the config names no modules that are skipped. `on_load`: plain weights are
    quantised on loading. `model_type` is known of a model's.
    """

    llm_int8_skip_modules: tuple[str, ...]
    by_default: bool = False
    on_load: bool = False
    model_type: str = ""

    @property
    def method(self) -> str:
        """`quant_method` as config.json writes it."""
        return "bitsandbytes"

    def of(self, parameters: Sequence[Parameter], model_type: str) -> Self:
        """With the modules that transformers leaves alone by default."""
        skipped = self.llm_int8_skip_modules
        if self.by_default:
            skipped += left_alone(parameters, model_type)
        return replace(self, llm_int8_skip_modules=skipped, model_type=model_type)

    def replaces(self, parameter: Parameter) -> bool:
        """Whether the parameter is the weight of a linear layer that is replaced."""
        module = parameter.name.removesuffix(".weight")
        if not parameter.linear or of_own_class(module, self.model_type):
            return False
        return not is_skipped(module, (*self.llm_int8_skip_modules, *KEPT_IN_FP32))

    def stored(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        """The tensors of the replaced layer, or the parameter as it is."""
        if self.replaces(parameter):
            yield from self._linear(linears(parameter)[0], dtype)
        elif found := self._unfused(parameter):
            for linear in found:
                made = self._linear(linear, dtype)
                yield from (replace(stored, copies=linear.copies) for stored in made)
        else:
            yield plain(parameter, dtype)

    def _unfused(self, parameter: Parameter) -> tuple[Linear, ...]:
        """Experts that are linear layers once they are quantised, which no loading makes of them.

        quantizers/base.py, MODULES_TO_PATCH_FOR_QUANTIZATION.
        """
        if self.on_load or parameter.group != "experts" or self.model_type not in UNFUSED:
            return ()
        layers = linears(parameter)
        return () if is_skipped(layers[0].module, self.llm_int8_skip_modules) else layers

    @abstractmethod
    def _linear(self, linear: Linear, dtype: str) -> Iterator[Stored]:
        """The tensors of one replaced layer; its bias is a parameter of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FourBit(OnLoading):
    """Two weights in a byte and a scale for 64 of them, counted through the whole tensor.

    `double_quant`: the scales are 8 bits wide and have a scale for 256. `storage` is the dtype of
    the words that the bytes are packed into; words that would stay incomplete are refused.
    """

    quant_type: Literal["nf4", "fp4"]
    double_quant: bool
    storage: str

    def _linear(self, linear: Linear, dtype: str) -> Iterator[Stored]:
        name, elements = f"{linear.module}.weight", linear.out * linear.into
        word = 2 * STORED_BYTES[self.storage]  # weights in a word
        if self.storage != "uint8" and elements % word:
            raise ConfigError(
                f"quantization_config.bnb_4bit_quant_storage={self.storage} is not allowed for "
                f"{name} of {elements} elements: a multiple of {word}, or uint8"
            )
        blocks = groups(elements, BLOCK)
        yield Stored(name=name, dtype=self.storage, shape=(-(-elements // word), 1))
        scales = "uint8" if self.double_quant else "fp32"
        yield Stored(name=f"{name}.absmax", dtype=scales, shape=(blocks,), role="scale")
        yield Stored(name=f"{name}.quant_map", dtype="fp32", shape=(16,), role="table")
        if self.double_quant:
            nested = (groups(blocks, NESTED_BLOCK),)
            yield Stored(name=f"{name}.nested_absmax", dtype="fp32", shape=nested, role="scale")
            yield Stored(name=f"{name}.nested_quant_map", dtype="fp32", shape=(256,), role="table")
        yield Stored(
            name=f"{name}.quant_state.bitsandbytes__{self.quant_type}",
            dtype="uint8",
            shape=(len(self._state(linear, dtype)),),
            role="table",
        )

    def _state(self, linear: Linear, dtype: str) -> str:
        """What is not a tensor, as JSON in bytes.

        The offset of nested scales is a number of the weights: of 19 or 20 digits mostly.
        """
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": BLOCK,
            "dtype": TORCH_NAMES[dtype],
            "shape": (linear.out, linear.into),
        }
        if self.double_quant:
            state |= {
                "nested_blocksize": NESTED_BLOCK,
                "nested_dtype": "float32",
                "nested_offset": 0.04528728127479553,
            }
        return json.dumps(state)


@dataclass(frozen=True, kw_only=True, slots=True)
class EightBit(OnLoading):
    """A byte a weight, a float32 scale for each row (SCB), and a byte that names the order."""

    def _linear(self, linear: Linear, dtype: str) -> Iterator[Stored]:
        module = linear.module
        yield Stored(name=f"{module}.weight", dtype="int8", shape=(linear.out, linear.into))
        yield Stored(name=f"{module}.SCB", dtype="fp32", shape=(linear.out,), role="scale")
        yield Stored(name=f"{module}.weight_format", dtype="uint8", shape=(), role="table")


def read_bitsandbytes(config: Mapping[str, Any]) -> Quantization:
    """BitsAndBytesConfig; 4 bits are fp4 where nothing else is said."""

    def flag(name: str) -> bool:
        value = config.get(name)
        if value is not None and not isinstance(value, bool):
            raise ConfigError(
                f"quantization_config.{name}={shown(value)} is not allowed: true or false"
            )
        return bool(value)

    four, eight = flag("load_in_4bit"), flag("load_in_8bit")
    if four == eight:
        raise ConfigError(
            f"quantization_config.load_in_4bit={four} beside load_in_8bit={eight} is not allowed: "
            "one of them true"
        )
    for name in ("llm_int8_has_fp16_weight", "llm_int8_enable_fp32_cpu_offload"):
        if flag(name):
            raise ConfigError(f"quantization_config.{name}=True is not read yet: false")
    skipped = skip_patterns(config, "llm_int8_skip_modules", default=HEADS)
    by_default = config.get("llm_int8_skip_modules") is None
    if eight:
        return EightBit(llm_int8_skip_modules=skipped, by_default=by_default)

    def choice(name: str, default: str, allowed: tuple[str, ...]) -> Any:
        value = config.get(name)
        word = default if value is None else value
        return check_choice(f"quantization_config.{name}", word, allowed)

    return FourBit(
        llm_int8_skip_modules=skipped,
        by_default=by_default,
        quant_type=choice("bnb_4bit_quant_type", "fp4", ("nf4", "fp4")),
        double_quant=flag("bnb_4bit_use_double_quant"),
        storage=STORAGE[choice("bnb_4bit_quant_storage", "uint8", tuple(STORAGE))],
    )


METHODS: dict[str, Callable[[Mapping[str, Any]], Quantization]] = {
    "bitsandbytes": read_bitsandbytes,
}
