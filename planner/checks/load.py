"""The KV cache at the stated load, and the first remedy that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from planner.catalog.gpus import Gpu, gpu_named
from planner.checks.edges import found
from planner.checks.subject import Load, Subject
from planner.errors import ConfigError
from planner.estimate import estimate, kv_cache_bytes
from planner.findings import Finding
from planner.format import gib
from planner.layers import GQA
from planner.model import Model
from planner.runtimes import runtime_named
from planner.workload import Deployment, Inference

GROUPED_KV_HEADS = 8
WINDOW_TOKENS = 4_096
LONGEST_CONTEXT = 2**22  # positions beyond are those of a model without an end
MORE_GPUS = (2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """What a deployment leaves: `free_bytes` is negative by what is missing."""

    weights_bytes: int
    kv_cache_bytes: int
    free_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """A change with its cost in words; `room` None: the planner does not plan it here."""

    change: str
    cost: str
    room: Room | None


def check_load(subject: Subject) -> Iterator[Finding]:
    """Weights and cache against the GPU, at the stated context or at the model's own length."""
    model, load = subject.model, subject.load
    if model is None or load.gpu is None:
        return
    if load.context_tokens is None:  # a full context
        limit = model.max_position_embeddings
        if limit is None or limit > LONGEST_CONTEXT:
            return
        load = replace(load, context_tokens=limit)
    deploy = load.deployment()
    gpu = gpu_named(deploy.gpu)
    room = room_of(model, load, deploy)
    if room is None or room.fits:
        return
    at = f"batch {load.batch} × {load.context_tokens:,} tokens in {load.runtime} on {gpu.label}"
    tried = list(remedies(model, load))
    if room.weights_bytes >= gpu.memory_bytes or not room.kv_cache_bytes:
        yield found(
            "weights-over-gpu",
            f"weights {gib(room.weights_bytes)} of {gib(gpu.memory_bytes)} before anything is "
            f"cached; {at}",
            do=advice([*loading(model, load), *(r for r in tried if "tensor" in r.change)]),
            where="gpu",
        )
        return
    yield found(
        "kv-cache-over-gpu",
        f"KV cache {gib(room.kv_cache_bytes)} beside {gib(room.weights_bytes)} of weights: "
        f"{gib(-room.free_bytes)} more than {gib(gpu.memory_bytes)} hold; {at}",
        do=advice(tried),
        where="gpu",
    )


def room_of(model: Model, load: Load, deploy: Deployment) -> Room | None:
    """The planner's estimate; where it has none, weights and cache alone. None: not even those."""
    context = load.context_tokens or 1
    work = Inference(batch=load.batch, prompt_tokens=context, logits="last")
    gpu = gpu_named(deploy.gpu)
    try:
        e = estimate(model, work, deploy)
    except ConfigError:
        return bare_room(model, load, deploy, gpu)
    return Room(
        weights_bytes=e.memory.weights_bytes,
        kv_cache_bytes=e.memory.kv_cache_bytes,
        free_bytes=e.headroom_bytes,
        fits=e.fits,
    )


def bare_room(model: Model, load: Load, deploy: Deployment, gpu: Gpu) -> Room | None:
    """Weights and cache of a model whose activations are not planned: a lower bound."""
    n = deploy.tensor_parallel
    computed = deploy.dtype or model.dtype
    try:
        cached = kv_cache_bytes(
            model,
            batch=load.batch,
            context_tokens=load.context_tokens or 1,
            dtype=deploy.kv_dtype or computed,
            compute_dtype=computed,
            runtime=deploy.runtime,
            tensor_parallel=n,
        )
    except ConfigError:
        return None
    weights = sum(s.copies * s.size_bytes for _, s in model.stored_tensors(deploy.dtype)) // n
    free = gpu.memory_bytes - weights - cached
    return Room(weights_bytes=weights, kv_cache_bytes=cached, free_bytes=free, fits=free >= 0)


def remedies(model: Model, load: Load) -> Iterator[Remedy]:
    """In this order: GQA, a window, an 8-bit cache, paging, more GPUs."""

    def remedy(change: str, cost: str, model: Model = model, **other: Any) -> Remedy:
        try:
            room = room_of(model, load, load.deployment(**other))
        except ConfigError:
            room = None
        return Remedy(change=change, cost=cost, room=room)

    grouped = fewer_kv_heads(model)
    if grouped is not None:
        heads = max(a.num_key_value_heads for a in attentions(grouped))
        yield remedy(
            f"GQA with {heads} kv heads",
            "the kv heads are pooled and the model is trained on for about 5 % of its pre-training "
            "(arXiv:2305.13245)",
            grouped,
        )
    windowed = with_window(model, WINDOW_TOKENS)
    if windowed is not None and (load.context_tokens or 0) > WINDOW_TOKENS:
        yield remedy(
            f"a sliding window of {WINDOW_TOKENS:,} tokens",
            f"each layer sees {WINDOW_TOKENS:,} tokens; a model trained without it must be "
            "fine-tuned, and retrieval from farther back suffers",
            windowed,
        )
    kept = runtime_named(load.runtime).kv_dtypes
    eight = next((d for d in ("int8", "fp8") if d in kept and d != load.kv_dtype), None)
    if eight is not None:
        yield remedy(
            f"an {eight} KV cache",
            "a small loss of quality (probe it: attnlab.probes.check reports the error by layer), "
            "and in transformers time to quantise and dequantise at each step",
            kv_dtype=eight,
        )
    if load.runtime != "vllm":
        yield remedy(
            "a paged cache (vllm)",
            "another engine; it holds whole blocks of what is there, not copies of what grows",
            runtime="vllm",
            kv_dtype=None,
            tensor_parallel=load.tensor_parallel,
        )
    for n in MORE_GPUS:
        if n > load.tensor_parallel:
            yield remedy(
                f"tensor_parallel={n} (vllm)",
                f"{n} GPUs, and two all-reduces in every layer of every step",
                runtime="vllm",
                kv_dtype=None if load.runtime != "vllm" else load.kv_dtype,
                tensor_parallel=n,
            )


def loading(model: Model, load: Load) -> Iterator[Remedy]:
    """Weights quantised as they are loaded."""
    for dtype in ("fp8", "int8", "nf4"):
        try:
            room = room_of(model, load, load.deployment(weight_dtype=dtype))
        except ConfigError:
            continue
        yield Remedy(change=f"{dtype} weights", cost="some loss of quality", room=room)


def advice(tried: list[Remedy]) -> str:
    """The first that fits with its cost, and by how much those before it miss."""
    short: list[str] = []
    for remedy in tried:
        if remedy.room is None:
            continue
        if remedy.room.fits:
            before = f" Not enough: {'; '.join(short)}." if short else ""
            return (
                f"First that fits: {remedy.change}, KV cache "
                f"{gib(remedy.room.kv_cache_bytes)}, {gib(remedy.room.free_bytes)} stay free. "
                f"Cost: {remedy.cost}.{before}"
            )
        short.append(f"{remedy.change} ({gib(-remedy.room.free_bytes)} missing)")
    return f"No single change fits: {'; '.join(short)}. Combine them, or lower batch and context."


def attentions(model: Model) -> list[GQA]:
    """The grouped-query attentions of its layers."""
    return [x.attention for x in model.layer_kinds() if isinstance(x.attention, GQA)]


def fewer_kv_heads(model: Model) -> Model | None:
    """The model with 8 kv heads (1 if it has 8); None where its cache is not one of heads."""
    kinds = attentions(model)
    if not kinds or len(kinds) != len(model.layer_kinds()):
        return None
    most = max(a.num_key_value_heads for a in kinds)
    wanted = GROUPED_KV_HEADS if most > GROUPED_KV_HEADS else 1
    if most == 1 or any(a.num_attention_heads % wanted for a in kinds):
        return None
    return with_attention(model, lambda a: replace(a, num_key_value_heads=wanted, cache_heads=None))


def with_window(model: Model, window: int) -> Model | None:
    """The model with this window on every layer without a smaller one."""
    kinds = attentions(model)
    if len(kinds) != len(model.layer_kinds()) or all(
        (a.sliding_window or window + 1) <= window for a in kinds
    ):
        return None
    windowed = with_attention(
        model, lambda a: replace(a, sliding_window=min(a.sliding_window or window, window))
    )
    return replace(windowed, mask_windows=None)


def with_attention(model: Model, change: Any) -> Model:
    """The model with each grouped-query attention changed."""
    return replace(
        model,
        layers=tuple(
            replace(x, attention=change(x.attention)) if isinstance(x.attention, GQA) else x
            for x in model.layers
        ),
    )
