"""Which step is written, and what of its sizes decides how it looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.autograd.step import StepWriter
from planner.autograd.tensors import Tensor
from planner.dtypes import element_bytes
from planner.layers import GQA, Layer
from planner.model import Model
from planner.program import B, Dims, Symbol, T
from planner.runtimes.attnlab_training.regime import SOME_BATCH, SOME_TOKENS

T_AND_ONE = Symbol("(T + 1)", lambda d: d.tokens + 1)
"""Labels with the one that is padded behind them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """What of the sizes decides which copies are made: whether they are 1, and the masks.

    `masked` are the windows that the sequence fills (masking_utils._ignore_causal_mask_sdpa).
    """

    several_batches: bool
    several_tokens: bool
    masked: frozenset[int]

    @staticmethod
    def of(model: Model, dims: Dims) -> Regime:
        """The regime of one point."""
        windows = {gqa_of(layer).sliding_window for layer in model.layer_kinds()}
        return Regime(
            several_batches=dims.batch > 1,
            several_tokens=dims.tokens > 1,
            masked=frozenset(w for w in windows if w is not None and w <= dims.tokens),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Which training step."""

    attention: Literal["sdpa", "eager"]
    dtype: str
    device: str
    optimizer: str | None = None
    optimizer_impl: str = "foreach"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What a decoder layer is given besides its input."""

    rotation: tuple[Tensor, Tensor] | None
    mask: Tensor | None


class TransformersWriter(StepWriter[Shared]):
    """A step of transformers in one regime of sizes."""

    def __init__(self, model: Model, step: Step, regime: Regime) -> None:
        tokens = SOME_TOKENS if regime.several_tokens else 1
        batch = SOME_BATCH if regime.several_batches else 1
        numbers = {B: batch, T: tokens, T_AND_ONE: tokens + 1}
        super().__init__(model, element_bytes(step.dtype), numbers)
        self.step, self.regime = step, regime


def gqa_of(layer: Layer) -> GQA:
    """The attention of a layer that is planned here."""
    assert isinstance(layer.attention, GQA)
    return layer.attention
