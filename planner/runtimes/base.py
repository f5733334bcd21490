"""What the estimate asks of a runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from planner.catalog.gpus import Gpu
from planner.errors import ConfigError, shown
from planner.layers import GQA, MLA, ALiBi, LearnedPositions, MoE, RoPE, Sinusoidal
from planner.ledger import Row
from planner.mixers import Mixer
from planner.model import Model
from planner.parallel import Share
from planner.program import Dims, Number, Program
from planner.trained.sharding import Sharding
from planner.workload import CacheSpec, Inference, Training


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A deployment with its defaults filled in: what decides which program runs."""

    attention: str
    dtype: str
    kv_dtype: str
    device: str  # "cpu" | "cuda"
    max_batched_tokens: int
    max_sequences: int
    multiprocessors: int
    block_tokens: int
    cache: CacheSpec | None = None
    mode: str = "graph"
    cuda_graphs: str = "outside"
    workspace_bytes: int = 0  # cuBLAS's
    l2_bytes: int = 0
    capability: str | None = None
    longest_tokens: int | None = None  # of one sequence: max_model_tokens, else the positions
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    host_add_s: float | None = None
    power_limit_w: float | None = None
    sharding: Sharding | None = None

    def held_dtype(self, work: Training) -> str:
        """What weights, gradients and states are kept in."""
        return self.sharding.held_dtype if self.sharding else work.held_dtype(self.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """A pool of whole KV blocks out of what was available.

    `available_bytes` is negative where weights and the profile run alone need more than the budget.
    A request has `groups` block tables, whose shortest block is one of `block_tokens`;
    `longest_blocks`: what one sequence of `longest_tokens` tokens may need.
    """

    available_bytes: int
    block_bytes: int
    groups: int
    block_tokens: int
    longest_blocks: int
    longest_tokens: int

    @property
    def blocks(self) -> int:
        """Whole blocks."""
        return max(0, self.available_bytes) // self.block_bytes

    @property
    def size_bytes(self) -> int:
        """Of the blocks."""
        return self.blocks * self.block_bytes

    @property
    def tokens(self) -> int:
        """Of one sequence that keeps all of them: "GPU KV cache size"."""
        return self.blocks // self.groups * self.block_tokens

    @property
    def concurrency(self) -> float:
        """How many sequences of `longest_tokens` tokens it holds at once."""
        return self.blocks / self.longest_blocks


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One pass of a workload: its program and its sizes; what has to be said of its peak."""

    name: str
    program: Program
    dims: Dims
    note: str = ""


class Runtime(Protocol):
    """The rules of one runtime."""

    @property
    def name(self) -> str:
        """How a Deployment names it."""

    @property
    def pooled(self) -> bool:
        """Whether the cache comes out of a pool that takes what everything else leaves."""

    @property
    def on_torch(self) -> bool:
        """Whether torch allocates what it holds; if not, programs are without the cache."""

    @property
    def version(self) -> str:
        """The version whose source says so."""

    @property
    def kv_dtypes(self) -> tuple[str, ...]:
        """What it can keep keys and values in that were computed in another dtype."""

    def attention(self, model: Model, name: str | None) -> str:
        """The backend: `name` if this model can run it, else ConfigError; None: the default."""

    def cache_rows(
        self,
        model: Model,
        *,
        batch: int,
        context_tokens: int,
        dtype: str,
        cache: CacheSpec | None,
        encoder_tokens: int,
        compute_dtype: str,
        decoded_tokens: int,
        blocks: tuple[int, int] | None = None,
    ) -> list[Row]:
        """The cache after `context_tokens` tokens of each of `batch` sequences.

        `dtype`: what keys and values are kept in, `compute_dtype`: what they are computed in.
        `encoder_tokens`: what cross-attention sees, where a model has it. `decoded_tokens`: how
        many of the context came one at a time, after the prefill. `blocks`: the first block of a
        pipeline stage and the one after its last; None: all of them.
        """

    def rank(self, model: Model, tensor_parallel: int) -> Model:
        """The part of `model` whose cache one of `tensor_parallel` GPUs keeps; else ConfigError."""

    def shares(
        self, model: Model, tensor_parallel: int, pipeline_parallel: int
    ) -> tuple[Share, ...]:
        """One GPU of each pipeline stage; ConfigError for a layout that it does not run."""

    def peak_note(self, model: Model) -> str:
        """What has to be said of this model's activation peak; empty where it is exact."""

    def cache_note(self, setting: Setting) -> str:
        """What has to be said of the peak for its cache's sake; empty where nothing has to."""

    def buffer_rows(self, model: Model, *, dtype: str, capability: str | None = None) -> list[Row]:
        """Tensors of the module that are not parameters, on a device of this capability."""

    def alike(self, model: Model, work: Inference) -> Number:
        """A number for each cell of a grid: those of the same one run the same programs."""

    def memory_phases(self, model: Model, work: Inference, setting: Setting) -> list[Phase]:
        """The passes among which the peak lies."""

    def pool(
        self, share: Share, setting: Setting, gpu: Gpu, *, budget_bytes: int, held_bytes: int
    ) -> Pool | None:
        """The pool out of a budget of which `held_bytes` are taken; None without one."""

    def prefill(self, model: Model, work: Inference, setting: Setting) -> Program:
        """The pass that yields the first token."""

    def decode(self, model: Model, work: Inference, setting: Setting) -> Program:
        """One step of the steady state."""


def unplanned_part(model: Model, mixers: tuple[type[Mixer], ...] = ()) -> str | None:
    """What no runtime has a program for yet, in a word; None where every block is planned.

    `mixers`: those that the runtime at hand has programs for.
    """
    if not model.is_decoder:
        return "bidirectional encoders"
    for layer in model.layer_kinds():
        if isinstance(layer.attention, Mixer) and not isinstance(layer.attention, mixers):
            return f"{layer.attention.kind} layers"
        if layer.attention is None or layer.feed_forward is None or layer.norms is not None:
            return "blocks without attention or feed-forward"
        if layer.cross_attention is not None:
            return "cross-attention"
        if layer.beside is not None or layer.extra_parameters:
            return "blocks with parts of their own"
        if isinstance(layer.attention, GQA) and layer.attention.shares_cache:
            return "caches shared between layers"
        if isinstance(layer.attention, GQA) and layer.attention.output_gate:
            return "gated attention"
        if isinstance(layer.feed_forward, MoE) and not layer.feed_forward.gated:
            return "experts without a gate"
        if isinstance(layer.attention, MLA) and layer.attention.indexer is not None:
            return "sparse attention to the picks of an indexer"
        if isinstance(layer.attention, GQA) and layer.attention.v_norm:
            return "normalised values"
    if not isinstance(model.positions, RoPE | LearnedPositions | Sinusoidal | ALiBi):
        return type(model.positions).__name__
    return None


def check_planned(runtime: str, model: Model, mixers: tuple[type[Mixer], ...] = ()) -> None:
    """ConfigError for a model whose passes are not written as programs yet."""
    part = unplanned_part(model, mixers)
    if part is not None:
        raise ConfigError(
            f"runtime={runtime} does not plan {part} of model_type={model.model_type} yet: "
            "parameters and kv_cache_bytes are known, `planner estimate --traced` has the peak"
        )


def whole(runtime: str, model: Model, tensor_parallel: int) -> Model:
    """`model` on one GPU; ConfigError for more, in a runtime that does not share it out."""
    check_one_gpu(runtime, tensor_parallel=tensor_parallel)
    return model


def one_share(
    runtime: str, model: Model, tensor_parallel: int, pipeline_parallel: int
) -> tuple[Share, ...]:
    """`model` on one GPU; ConfigError for more, in a runtime that does not share it out."""
    check_one_gpu(runtime, tensor_parallel=tensor_parallel, pipeline_parallel=pipeline_parallel)
    return (Share(model=model, whole=model),)


def check_one_gpu(runtime: str, **degrees: int) -> None:
    """ConfigError for a parallel layout."""
    for field, degree in degrees.items():
        if degree != 1:
            raise ConfigError(f"{field}={degree} is not planned for runtime={runtime}: 1, or vllm")


def check_step(runtime: str, work: Training, **planned: tuple[object, ...]) -> None:
    """ConfigError for a field of a training step that is none of what the runtime plans."""
    for field, allowed in planned.items():
        value = getattr(work, field)
        if value not in allowed:
            raise ConfigError(
                f"{field}={value!r} is not planned for runtime={runtime} yet: "
                f"{', '.join(map(str, allowed))}"
            )


def check_cache_kind(
    runtime: str, cache: CacheSpec | None, kinds: tuple[str, ...], *, scaled: bool = False
) -> str:
    """The kind of cache, the first of `kinds` where none is given; `scaled`: it may have scales."""
    if cache is None:
        return kinds[0]
    if cache.kind not in kinds:
        raise ConfigError(
            f"cache.kind={cache.kind!r} is not in runtime={runtime}: one of {', '.join(kinds)}"
        )
    if cache.scales is not None and not scaled:
        raise ConfigError(
            f"cache.scales={cache.scales!r} is not in runtime={runtime}: None, or attnlab"
        )
    return cache.kind


def check_kv_dtype(runtime: str, dtype: str, kept: tuple[str, ...], *, why: str = "") -> None:
    """ConfigError for a dtype that the runtime's cache is not kept in."""
    if dtype not in kept:
        raise ConfigError(
            f"kv_dtype={dtype!r} is not kept by runtime={runtime}{why}: one of {', '.join(kept)}"
        )


def static_capacity(cache: CacheSpec | None, context_tokens: int) -> int:
    """Tokens that a static cache is allocated for; ConfigError if the context does not fit."""
    capacity = None if cache is None else cache.capacity_tokens
    if capacity is None:
        return context_tokens
    if np.any(capacity < context_tokens):
        raise ConfigError(
            f"cache.capacity_tokens={capacity} is less than the context of {context_tokens} tokens"
        )
    return capacity


def clock_capacity(setting: Setting, work: Inference) -> Number | None:
    """Tokens that a static cache has room for, which passes over it go through with a mask; None:
    passes see the context alone.
    """
    if setting.cache is None or setting.cache.kind != "static":
        return None
    return static_capacity(setting.cache, work.context_tokens)


def choose_attention(
    runtime: str, model: Model, name: str | None, allowed: tuple[str, ...], *, reason: str = ""
) -> str:
    """`name` if allowed, the first allowed one for None; else ConfigError with the reason."""
    if name is None:
        return allowed[0]
    if name not in allowed:
        why = f" ({reason})" if reason else ""
        raise ConfigError(
            f"attention={shown(name)} is not what {model.model_type} has in {runtime}: "
            f"one of {', '.join(allowed)}{why}"
        )
    return name
