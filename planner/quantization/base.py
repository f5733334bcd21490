"""How quantised weights lie in files and in memory: the tensors that stand for one parameter."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, Self

from planner.tensors import Parameter

Role = Literal["weight", "scale", "zero point", "index", "table"]

STORED_BYTES = {
    "fp32": 4,
    "bf16": 2,
    "fp16": 2,
    "fp8": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}
"""Bytes of one element as it is stored; packed formats count the words they are packed into."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """One tensor of a checkpoint, or `copies` equal ones of neighbouring experts (named by `*`)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    role: Role = "weight"
    copies: int = 1

    @property
    def size_bytes(self) -> int:
        """Bytes of all copies."""
        return self.copies * prod(self.shape) * STORED_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A linear layer as quantisers see it: its module's name, its sizes, how many there are."""

    module: str
    out: int
    into: int
    copies: int = 1


class Quantization:
    """A method with its settings; subclasses are frozen dataclasses."""

    __slots__ = ()

    @property
    @abstractmethod
    def method(self) -> str:
        """`quant_method` as config.json writes it."""

    def of(self, parameters: Sequence[Parameter], model_type: str) -> Self:
        """The method with what depends on all of a checkpoint's parameters filled in."""
        return self

    @abstractmethod
    def stored(self, parameter: Parameter, dtype: str) -> Iterator[Stored]:
        """The tensors that stand for a parameter, whose name is that of the checkpoint.

        `dtype` is the model's, in which everything that is not quantised stays.
        """


def plain(parameter: Parameter, dtype: str) -> Stored:
    """A parameter as it is."""
    return Stored(name=parameter.name, dtype=dtype, shape=parameter.shape)


def linears(parameter: Parameter) -> tuple[Linear, ...]:
    """The linear layers in a parameter: itself, those of every routed expert, or none.

    Routed experts are fused in transformers ([E, 2 · i, h] and [E, h, i], some [E, in, out]) and
    single in files.
    """
    name = parameter.name.removesuffix(".weight")
    match parameter.shape:
        case (into, out) if parameter.transposed:
            return (Linear(module=name, out=out, into=into),)
        case (out, into) if parameter.linear:
            return (Linear(module=name, out=out, into=into),)
        case (E, *sizes) if parameter.group == "experts" and len(sizes) == 2:
            out, into = sizes[::-1] if parameter.transposed else sizes
            stem, _, part = name.rpartition(".")
            one = f"{stem}.*"
            if part == "gate_up_proj":
                return tuple(
                    Linear(module=f"{one}.{half}", out=out // 2, into=into, copies=E)
                    for half in ("gate_proj", "up_proj")
                )
            return (Linear(module=f"{one}.{part}", out=out, into=into, copies=E),)
    return ()


def groups(size: int, group_size: int) -> int:
    """Groups of `group_size` that cover `size`, the last one perhaps short; −1: one for all."""
    return 1 if group_size == -1 else -(-size // group_size)
