"""Which pass is written, and what of its sizes decides how it looks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import numpy as np

from planner.autograd.aten import Sizes
from planner.autograd.autocast import widens
from planner.autograd.passes import PassWriter
from planner.autograd.tensors import Tensor
from planner.dtypes import element_bytes
from planner.layers import GQA, Layer
from planner.mixers.mamba import Mamba2
from planner.model import Model
from planner.module_order import block_order
from planner.program import PAST, S_ENC, C, Dims, Extent, Number, S, Symbol, T, minimum
from planner.runtimes.quantised_cache import QuantisedCache
from planner.runtimes.transformers_code.families import code_of
from planner.tensors import Parameter
from planner.trained.frozen import NOTHING, FrozenParts
from planner.trained.sharding import Sharding
from planner.workload import LoRA

SOME_BATCH, SOME_TOKENS, SOME_CONTEXT, SOME_ENCODER = 999_983, 1_000_003, 2_000_003, 3_000_017
SOME_CAPACITY = 4_000_037
"""Primes that stand for any size above 1 where strides are compared."""
T_AND_ONE = Symbol("(T + 1)", lambda d: d.tokens + 1)
"""Labels with the one that is padded behind them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FourBitWeights:
    """Linear layers are bitsandbytes': `dtype` is what they compute in and were quantised from.

    `modules` are the last words of the names of those that are, but for a block's `left_alone`.
    `packed`: sizes (out, in) of those whose forward does not make the weight.
    """

    dtype: str
    double_quant: bool
    modules: frozenset[str]
    packed: frozenset[tuple[int, ...]] = frozenset()


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """A prefill into an empty cache, one decode step over a filled one, or a training step.

    `held_whole`: sliding layers still hold the storage of the whole prefill (the first step).
    `padded`: an attention mask hides padding. `float32_logits`: they are cast, untrained too.
    `static`: a StaticCache. `quantised`: a QuantizedCache; with neither a DynamicCache. Of it
    `residual_tokens` are unquantised before the pass. Training has no cache; `checkpointed`: every
    such layer runs again on the way back, but for each `keeps_every`-th of its products where
    `selective`; `lora`: adapters are trained, nothing else; `accumulates`: earlier steps left
    gradients; `autocast`: the dtype of a region around the forward, weights in fp32; `four_bit`:
    frozen linear layers of 4 bits; `scales`: a GradScaler scales the loss; `copies`: the optimizer
    steps master weights; `sharding`: parameters are gathered layer by layer; `frozen`: parts that
    are not trained.
    """

    kind: Literal["prefill", "decode", "training"]
    attention: Literal["sdpa", "eager"]
    dtype: str
    device: str
    capability: str | None = None  # of a CUDA device
    multiprocessors: int = 0  # of a CUDA device; 0: not known
    kv_dtype: str | None = None
    logits: Literal["all", "last"] = "all"
    held_whole: bool = False
    static: bool = False
    padded: bool = False
    float32_logits: bool = False
    quantised: QuantisedCache | None = None
    residual_tokens: int = 0
    optimizer: str | None = None
    optimizer_impl: str = "foreach"
    checkpointed: int = 0
    selective: bool = False
    keeps_every: int = 1
    autocast: str | None = None
    lora: LoRA | None = None
    accumulates: bool = False
    four_bit: FourBitWeights | None = None
    scales: bool = False
    copies: bool = False
    sharding: Sharding | None = None
    frozen: FrozenParts = NOTHING

    @property
    def held_dtype(self) -> str:
        """What weights are kept in: fp32 where a region of autocast casts all that is trained."""
        return "fp32" if self.autocast and self.lora is None else self.dtype


@dataclass(frozen=True, kw_only=True, slots=True)
class Regime:
    """What of the sizes decides which copies are made: whether they are 1, and the masks.

    `masked` are the windows that the context, or a static cache, fills
    (masking_utils._ignore_causal_mask_sdpa); `exceeded` those that a static cache's context passes.
    `reached`: the marks of `token_marks` that the pass's tokens reach; `divided`: the chunks of
    `chunk_sizes` that they fill, the last one too.
    """

    several_batches: bool
    several_tokens: bool
    several_encoded: bool
    several_held: bool
    masked: frozenset[int]
    exceeded: frozenset[int] = frozenset()
    reached: frozenset[int] = frozenset()
    divided: frozenset[int] = frozenset()

    def fills(self, mark: int) -> bool:
        """Whether the pass has so many tokens, one of `token_marks`."""
        return mark in self.reached

    @staticmethod
    def of(model: Model, dims: Dims) -> Regime:
        """The regime of a point, or of the first of many alike."""
        sizes = (dims.batch, dims.tokens, dims.context, S_ENC.of(dims), C.of(dims))
        batch, tokens, context, encoded, held = (np.ravel(x)[0] for x in sizes)
        return Regime(
            several_batches=bool(batch > 1),
            several_tokens=bool(tokens > 1),
            several_encoded=bool(encoded > 1),
            several_held=bool(held > 1),
            masked=frozenset(w for w in windows(model) if w <= held),
            exceeded=frozenset(
                w for w in windows(model) if dims.capacity is not None and w < context
            ),
            reached=frozenset(mark for mark in token_marks(model) if mark <= tokens),
            divided=frozenset(size for size in chunk_sizes(model) if tokens % size == 0),
        )

    @staticmethod
    def codes(model: Model, dims: Dims) -> Number:
        """A number for each cell; cells of one regime have the same."""
        code = (dims.batch > 1) * 1 + (dims.tokens > 1) * 2 + (S_ENC.of(dims) > 1) * 4
        code = code + (C.of(dims) > 1) * 8
        for place, window in enumerate(windows(model), start=4):
            code = code + (dims.context >= window) * 2**place
        for mark in token_marks(model):
            code = 2 * code + (dims.tokens >= mark)
        for size in chunk_sizes(model):
            code = 2 * code + (dims.tokens % size == 0)
        return code

    @staticmethod
    def bits(model: Model) -> int:
        """How many bits the numbers of `codes` have."""
        return 4 + len(windows(model)) + len(token_marks(model)) + len(chunk_sizes(model))


def windows(model: Model) -> list[int]:
    """All windows for which a class makes masks."""
    kinds = {id(layer): layer for layer in model.layers}.values()  # equal ones may come twice
    made = model.mask_windows or [window_of(layer) for layer in kinds]
    return sorted({w for w in made if w is not None})


def token_marks(model: Model) -> list[int]:
    """Numbers of tokens from which Mamba-2 layers run otherwise.

    The width of the convolution, below which its inputs are padded; the first token of a second
    chunk.
    """
    return sorted({mark for x in _mixers(model) for mark in (x.conv_kernel, x.chunk_size + 1)})


def chunk_sizes(model: Model) -> list[int]:
    """Tokens of the chunks that Mamba-2 layers cut a prompt into, padded where it does not fit."""
    return sorted({x.chunk_size for x in _mixers(model)})


def _mixers(model: Model) -> list[Mamba2]:
    return [x.attention for x in model.layer_kinds() if isinstance(x.attention, Mamba2)]


def window_of(layer: Layer) -> int | None:
    """The positions that a layer's queries see."""
    return layer.attention.sliding_window if isinstance(layer.attention, GQA) else None


def kept_tokens(window: int | None, tokens: Symbol) -> Extent:
    """Tokens that a cache layer keeps of `tokens`: W − 1 of a sliding layer (all when W is 1).

    cache_utils.DynamicSlidingWindowLayer.update: keys[:, :, -W + 1 :, :].
    """
    if not window or window == 1:
        return tokens
    kept = window - 1
    return Symbol(f"min({tokens.name}, {kept})", lambda d: minimum(tokens.of(d), kept))


def static_tokens(window: int | None) -> Extent:
    """Tokens that a layer of a StaticCache has room for."""
    if window is None:
        return C
    return Symbol(f"min(C, {window})", lambda d: minimum(C.of(d), window))


def seen_tokens(window: int | None) -> Symbol:
    """Keys that one layer's attention gets: what was kept of the past, and this pass's own."""
    if not window or window == 1:
        return S
    kept = kept_tokens(window, PAST)
    assert isinstance(kept, Symbol)
    return Symbol(f"({kept.name} + T)", lambda d: kept.of(d) + d.tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What a decoder layer is given besides its input.

    `rotation`: cosines and sines, or complex numbers alone.
    """

    rotation: tuple[Tensor, ...] | None
    mask: Tensor | None
    alibi: Tensor | None = None
    position_ids: Tensor | None = None
    bias: Tensor | None = None
    cross_bias: Tensor | None = None
    encoded: Tensor | None = None


class CodeWriter(PassWriter[Shared]):
    """A pass of transformers in one regime of sizes."""

    def __init__(self, model: Model, what: Pass, regime: Regime) -> None:
        batch = SOME_BATCH if regime.several_batches else 1
        tokens = SOME_TOKENS * prod(regime.divided) if regime.several_tokens else 1
        context = SOME_CONTEXT if what.kind == "decode" else tokens
        encoder = SOME_ENCODER if regime.several_encoded else 1
        held = SOME_CAPACITY if regime.several_held else 1
        dims = Dims(batch=batch, tokens=tokens, context=context, encoder=encoder, capacity=held)
        numbers = Sizes(dims)
        trains = what.kind == "training"
        super().__init__(
            model,
            element_bytes(what.held_dtype),
            numbers,
            trains=trains,
            checkpointed=what.checkpointed,
            selective=what.selective,
            autocast=element_bytes(what.autocast) if what.autocast else None,
            lora=what.lora,
            accumulates=what.accumulates,
            scales=what.scales,
            copies=what.copies,
            sharding=what.sharding,
            frozen=what.frozen,
        )
        self.what, self.regime = what, regime
        self.left_alone = frozenset[str]()  # of the block that is written
        self.f.widens = widens(what.device)
        self.f.softmax_casts = what.device == "cuda" and "fp16" in (what.dtype, what.autocast)
        self.aten.watched = what.device == "cpu"
        self.aten.keeps_every = what.keeps_every
        self.aten.on_gpu = what.device == "cuda"
        self.aten.multiprocessors = what.multiprocessors
        self.code = code_of(model.text_type)

    def inside(self, parameters: Iterable[Parameter]) -> Iterable[Parameter]:
        """As <Type>DecoderLayer makes them."""
        return block_order(parameters, self.model)

    def received(self, given: Shared) -> Shared:
        """Float32 tables are cast to the dtype of gathered weights (cast_forward_inputs)."""
        if self.gathering is None or given.rotation is None:
            return given
        cast = (self.aten.cast(x, self.b, "rotary tables") for x in given.rotation)
        return replace(given, rotation=tuple(cast))

    def keys_of(self, window: int | None) -> Extent:
        """How many keys a layer of this window attends to."""
        if self.what.static:
            prefills = self.what.kind == "prefill"
            return T if prefills and window in self.regime.exceeded else static_tokens(window)
        return seen_tokens(window) if self.what.kind == "decode" else T
