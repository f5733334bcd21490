"""The tensors that blocks are made of: trained parameters, and what a cache keeps for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

Group = Literal[
    "embedding",
    "attention",
    "feed_forward",
    "router",
    "experts",
    "norm",
    "head",
    "encoder",
    "vision",
    "audio",
    "projector",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One trained tensor. `layer` is None outside the blocks.

    `linear`: the [out, in] weight of a linear layer (nn.Linear), which quantisers replace.
    `transposed`: it lies as [in, out] (GPT-2's Conv1D, the experts of gpt-oss and llama-4).
    `shared`: other blocks use it, too (zamba2).
    """

    name: str
    group: Group
    layer: int | None
    shape: tuple[int, ...]
    linear: bool = False
    transposed: bool = False
    shared: bool = False

    @property
    def count(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """One tensor that a cache keeps in a layer for each sequence.

    `dtype=None`: the cache's own; recurrent states are mostly "fp32" whatever the model's dtype.
    `formula` and `values` say where `elements` comes from.
    """

    name: str
    elements: int
    formula: str
    values: tuple[tuple[str, int], ...]
    dtype: str | None = None


def tensor(name: str, *shape: int, group: Group = "attention") -> Parameter:
    """A parameter of a block, named relative to it."""
    return Parameter(name=name, group=group, layer=None, shape=shape)


def linear(name: str, group: Group, *, out: int, into: int, bias: bool) -> Iterator[Parameter]:
    """A linear layer: weight [out, in], and its bias."""
    yield Parameter(name=f"{name}.weight", group=group, layer=None, shape=(out, into), linear=True)
    if bias:
        yield tensor(f"{name}.bias", out, group=group)


def conv1d(name: str, *, channels: int, width: int, bias: bool) -> Iterator[Parameter]:
    """A depthwise causal convolution: weight [channels, 1, width], and its bias."""
    yield tensor(f"{name}.weight", channels, 1, width)
    if bias:
        yield tensor(f"{name}.bias", channels)
