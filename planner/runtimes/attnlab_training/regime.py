"""Which step is written, and what of its sizes decides how it looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.autograd.aten import Sizes
from planner.autograd.autocast import widens
from planner.autograd.passes import PassWriter
from planner.autograd.tensors import Tensor
from planner.dtypes import element_bytes
from planner.layers import GQA, Layer
from planner.model import Model
from planner.program import Dims, Symbol
from planner.trained.optimizer_parts import Part as TrainedPart
from planner.workload import LoRA

SOME_BATCH, SOME_TOKENS = 999_983, 1_000_003
"""Primes that stand for any size above 1 where strides are compared."""
T_AND_SINK = Symbol("(T + 1)", lambda d: d.tokens + 1)
"""The keys of a sequence and the logit beside them."""


def last_chunk(tokens: int) -> Symbol:
    """Tokens of the last of several chunks, which is shorter than `tokens`; 0: there is none."""
    return Symbol(f"(B · T % {tokens})", lambda d: d.batch * d.tokens % tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """What of the sizes decides which copies are made: whether they are 1, and the masks.

    `masked` are the windows shorter than the sequence.
    """

    several_batches: bool
    several_tokens: bool
    masked: frozenset[int]

    @staticmethod
    def of(model: Model, dims: Dims) -> Regime:
        """The regime of one point."""
        windows = {window_of(gqa_of(layer)) for layer in model.layer_kinds()}
        return Regime(
            several_batches=dims.batch > 1,
            several_tokens=dims.tokens > 1,
            masked=frozenset(w for w in windows if w is not None and w < dims.tokens),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Which training step. `autocast`: the dtype of products in its region, around the forward.

    `loss_chunk_tokens`: head and loss of so many tokens at a time, None: of all.
    """

    attention: Literal["sdpa", "naive"]
    dtype: str
    device: str
    capability: str | None = None
    multiprocessors: int = 0
    optimizer: str | None = None
    optimizer_impl: str = "foreach"
    checkpointing: Literal["none", "full", "selective"] = "none"
    checkpoint_every: int = 1
    lora: LoRA | None = None
    autocast: str | None = None
    loss_chunk_tokens: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What a block is given besides its input: Transformer.forward's rotation and mask."""

    rotation: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    positions: Tensor


class AttnlabWriter(PassWriter[Shared]):
    """A step of attnlab in one regime of sizes."""

    def __init__(self, model: Model, step: Step, regime: Regime) -> None:
        tokens = SOME_TOKENS if regime.several_tokens else 1
        batch = SOME_BATCH if regime.several_batches else 1
        numbers = Sizes(Dims(batch=batch, tokens=tokens, context=tokens))
        if step.loss_chunk_tokens is not None:
            numbers[last_chunk(step.loss_chunk_tokens)] = SOME_TOKENS
        super().__init__(
            model,
            element_bytes(step.dtype),
            numbers,
            checkpointed=0 if step.checkpointing == "none" else step.checkpoint_every,
            selective=step.checkpointing == "selective",
            lora=step.lora,
            autocast=None if step.autocast is None else element_bytes(step.autocast),
        )
        self.step, self.regime = step, regime
        self.f.widens = widens(step.device)
        self.aten.watched = step.device == "cpu"
        self.aten.on_gpu = step.device == "cuda"
        self.aten.multiprocessors = step.multiprocessors

    def trained_parts(self) -> list[TrainedPart]:
        """Transformer makes its norm and head before the layers: so the optimizer has them."""
        return sorted(super().trained_parts(), key=lambda part: part.first_layer is not None)


def gqa_of(layer: Layer) -> GQA:
    """The attention of a layer that attnlab trains."""
    assert isinstance(layer.attention, GQA)
    return layer.attention


def window_of(gqa: GQA) -> int | None:
    """masks.pattern_of: a window that is only a mask is one too."""
    windows = [w for w in (gqa.sliding_window, gqa.masked_window) if w is not None]
    return min(windows, default=None)
