"""Joins model, workload and deployment into an Estimate."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache

from planner.activations import Peak, peak, peak_bytes
from planner.catalog.gpus import Gpu, gpu_named
from planner.dtypes import COMPUTE_DTYPES, KV_DTYPES, element_bytes
from planner.errors import MAX_SIZE, ConfigError, check_choice, check_size, shown
from planner.ledger import Row, total_bytes
from planner.model import Model
from planner.optimizers import optimizer_rows
from planner.overhead import WITH_CONTEXT, context_bytes, overhead_rows, workspace_bytes
from planner.parallel import Share
from planner.program import formula, symbols
from planner.quantization.base import STORED_BYTES
from planner.quantization.gguf import Gguf
from planner.quantization.on_load import quantised_on_load
from planner.quantization.unpacked import unpacked_on
from planner.reserved import AllocatorPlan
from planner.result import Estimate, Memory, TorchPeaks, Unsegmented
from planner.runtimes import runtime_named
from planner.runtimes.base import Phase, Runtime, Setting
from planner.runtimes.quantised_cache import DEFAULT_DTYPE
from planner.runtimes.transformers import is_quantised
from planner.runtimes.vllm import batch_limits
from planner.runtimes.vllm_groups import DEFAULT_BLOCK_TOKENS
from planner.runtimes.vllm_overhead import outside_rows
from planner.training import gradient_rows, training_phase, unfinished_row
from planner.workload import CacheSpec, Deployment, Inference, Training


def kv_cache_bytes(
    model: Model,
    *,
    batch: int,
    context_tokens: int,
    dtype: str = "bf16",
    runtime: str = "transformers",
    cache: CacheSpec | None = None,
    encoder_tokens: int | None = None,
    compute_dtype: str | None = None,
    decoded_tokens: int = 0,
    tensor_parallel: int = 1,
) -> int:
    """Bytes of the KV cache of `batch` sequences of `context_tokens` tokens in a named runtime.

    Counts beyond the model's positions too. Raises ConfigError for sizes out of range, an unknown
    dtype or runtime, a kind of cache that the runtime lacks or that does not keep the dtype.

    `dtype`: what keys and values are kept in; scales are counted where the runtime has them.
    `compute_dtype`: what they are computed in, which scales and residuals of quantised caches are
    kept in (None: the same where it can be, else the model's). `decoded_tokens`: how many of the
    context came one at a time after the prefill; they fill the residual of a quantised cache.

    `tensor_parallel`: GPUs that share the heads; the bytes are those of one of them (vllm).

    `encoder_tokens`: what a sequence-to-sequence model's cross-attention sees; None: as many as
    `context_tokens`, or what the model fixes (whisper: 1 500). Encoders without a decoder: 0 bytes.
    """
    check_size("batch", batch)
    check_size("context_tokens", context_tokens, minimum=0)
    check_choice("dtype", dtype, KV_DTYPES)
    check_size("decoded_tokens", decoded_tokens, minimum=0, maximum=max(0, context_tokens - 1))
    computed = compute_dtype or (dtype if dtype in COMPUTE_DTYPES else model.dtype)
    check_choice("compute_dtype", computed, COMPUTE_DTYPES)
    check_size("tensor_parallel", tensor_parallel)
    rules = runtime_named(runtime)
    rows = rules.cache_rows(
        rules.rank(model, tensor_parallel),
        batch=batch,
        context_tokens=context_tokens,
        dtype=dtype,
        cache=cache,
        encoder_tokens=_encoder_tokens(model, encoder_tokens, context_tokens),
        compute_dtype=computed,
        decoded_tokens=decoded_tokens,
    )
    return total_bytes(rows)


def _encoder_tokens(model: Model, given: int | None, context_tokens: int) -> int:
    """What cross-attention sees: as given, what the model fixes, else as many as the context."""
    if given is None:
        return model.encoder_tokens or context_tokens
    if not any(layer.cross_attention for layer in model.layer_kinds()):
        raise ConfigError(
            f"encoder_tokens={shown(given)} is not allowed: None for {model.model_type}"
        )
    return check_size("encoder_tokens", given, maximum=model.encoder_tokens or MAX_SIZE)


def estimate(model: Model, work: Inference | Training, deploy: Deployment) -> Estimate:
    """Memory and latency of a workload. Something that does not fit is an answer, not an error.

    Raises ConfigError for what cannot run: a context beyond the model's positions, an attention
    backend that the model's class refuses, a quantised checkpoint.
    """
    if isinstance(work, Training):
        return _of_training(_as_loaded(model, deploy), work, deploy)
    runtime, gpu = runtime_named(deploy.runtime), gpu_named(deploy.gpu)
    checkpoint = _as_loaded(model, deploy)
    model = _as_held(checkpoint, deploy, gpu)
    model.check_positions(work.context_tokens)
    setting = _setting(model, deploy, runtime, gpu)
    cache = deploy.cache
    if runtime.pooled:
        _check_served(work, deploy)
        if cache is None or cache.kind == "paged":
            cache = CacheSpec(kind="paged", block_tokens=setting.block_tokens)
    if cache is not None and cache.kind == "static" and runtime.name == "transformers":
        raise ConfigError(
            "cache.kind='static' is not planned for runtime=transformers yet: dynamic "
            "(kv_cache_bytes counts both)"
        )

    note = runtime.peak_note(model) or _quantised_note(model) or runtime.cache_note(setting)
    built = [
        _of_share(
            share,
            model,
            work,
            deploy,
            setting,
            cache=cache,
            weights_note="" if model is checkpoint else _unpacked_note(checkpoint, gpu),
            peak_note=note,
        )
        for share in runtime.shares(model, deploy.tensor_parallel, deploy.pipeline_parallel)
    ]
    return min(built, key=_room)


def _room(estimate: Estimate) -> tuple[int, int]:
    """What a GPU has left, to find the worst: blocks of a pool, else memory."""
    pool = estimate.pool
    free = estimate.gpu.memory_bytes - estimate.memory.total_bytes
    return (MAX_SIZE, free) if pool is None else (pool.blocks, pool.available_bytes)


def _of_share(
    share: Share,
    model: Model,
    work: Inference,
    deploy: Deployment,
    setting: Setting,
    *,
    cache: CacheSpec | None,
    weights_note: str,
    peak_note: str,
) -> Estimate:
    """The estimate of one GPU, which holds `share` of `model`."""
    runtime, gpu = runtime_named(deploy.runtime), gpu_named(deploy.gpu)
    part = share.model
    weights = _weight_rows(
        part,
        runtime,
        setting.dtype,
        note="; ".join(filter(None, (weights_note, share.in_words))),
        capability=setting.capability,
    )
    kv = runtime.cache_rows(
        share.whole,
        batch=work.batch,
        context_tokens=work.context_tokens,
        dtype=setting.kv_dtype,
        cache=cache,
        encoder_tokens=_encoder_tokens(model, work.encoder_tokens, work.prompt_tokens),
        compute_dtype=setting.dtype,
        decoded_tokens=work.output_tokens - 1,
        blocks=share.blocks,
    )
    phases = runtime.memory_phases(part, work, setting)
    phase = max(phases, key=lambda phase: peak_bytes(phase.program, phase.dims))
    highest = peak(phase.program, phase.dims)
    kv_bytes = total_bytes(kv)
    apart = runtime.pooled or not runtime.on_torch
    activations = list(_activation_rows(highest, phase, kv_bytes, note=peak_note, apart=apart))
    overhead = list(overhead_rows(gpu, workspace=runtime.on_torch and not runtime.pooled))
    if runtime.pooled:
        overhead += outside_rows(share, setting, gpu)
    rows = (*weights, *kv, *activations, *overhead)
    torch = _torch_peaks(model, work, setting, runtime, gpu, rows, highest)
    outside = total_bytes(rows, "overhead")
    if not apart:
        outside -= workspace_bytes(gpu)
    memory = _memory(rows, highest, torch, outside=outside, apart=apart)
    pool = runtime.pool(
        share,
        setting,
        gpu,
        budget_bytes=int(gpu.memory_bytes * deploy.memory_utilization),
        held_bytes=memory.weights_bytes + memory.activations_bytes,
    )
    if pool is not None:
        memory = replace(memory, unused_pool_bytes=max(0, pool.size_bytes - kv_bytes))
    return Estimate(
        model=model,
        share=share,
        work=work,
        deploy=deploy,
        setting=setting,
        gpu=gpu,
        memory=memory,
        peak=highest,
        peak_phase=phase.name,
        rows=rows,
        pool=pool,
        peak_note=peak_note,
    )


def _of_training(model: Model, work: Training, deploy: Deployment) -> Estimate:
    """One training step. Gradients count whole; what they lack at the peak is activations' own."""
    runtime, gpu = runtime_named(deploy.runtime), gpu_named(deploy.gpu)
    setting = _setting(model, deploy, runtime, gpu)
    phase = training_phase(model, work, deploy, setting)
    highest = peak(phase.program, phase.dims)
    weights = _weight_rows(model, runtime, setting.dtype, note="")
    gradients = gradient_rows(weights)
    rows = (
        *weights,
        *gradients,
        *optimizer_rows(model, work, dtype=setting.dtype, device=setting.device),
        *_activation_rows(highest, phase, 0, note=phase.note, apart=False),
        *unfinished_row(highest, gradients),
        *overhead_rows(gpu, workspace=True, trains=True),
    )
    held = total_bytes(rows, "weights") + total_bytes(rows, "optimizer") + highest.live_bytes
    torch: TorchPeaks = Unsegmented(peak_allocated_bytes=held + work.inputs_bytes)
    if gpu.vendor in WITH_CONTEXT:
        torch = AllocatorPlan(
            model=model,
            work=work,
            setting=setting,
            runtime=runtime.name,
            workspace_bytes=workspace_bytes(gpu),
            capacity_bytes=max(0, gpu.memory_bytes - context_bytes(gpu)),
        )
    return Estimate(
        model=model,
        share=Share(model=model, whole=model),
        work=work,
        deploy=deploy,
        setting=setting,
        gpu=gpu,
        memory=_memory(rows, highest, torch, outside=context_bytes(gpu), apart=False),
        peak=highest,
        peak_phase=highest.phase,
        rows=rows,
        pool=None,
        peak_note=phase.note,
    )


def _setting(model: Model, deploy: Deployment, runtime: Runtime, gpu: Gpu) -> Setting:
    dtype = deploy.dtype or model.dtype
    longest = deploy.max_model_tokens or model.max_position_embeddings
    batched, sequences = batch_limits(
        gpu,
        longest_tokens=longest,
        max_batched_tokens=deploy.max_batched_tokens,
        max_sequences=deploy.max_sequences,
    )
    quantised = deploy.cache is not None and deploy.cache.kind == "quantised"
    return Setting(
        attention=runtime.attention(model, deploy.attention),
        dtype=dtype,
        kv_dtype=deploy.kv_dtype or (DEFAULT_DTYPE if quantised else dtype),
        device="cpu" if gpu.is_cpu else "cuda",
        max_batched_tokens=batched,
        max_sequences=sequences,
        multiprocessors=gpu.multiprocessors or 0,
        block_tokens=_block_tokens(deploy),
        cache=deploy.cache,
        mode=deploy.mode,
        cuda_graphs=deploy.cuda_graphs,
        workspace_bytes=workspace_bytes(gpu),
        l2_bytes=gpu.l2_bytes or 0,
        capability=gpu.compute_capability,
        longest_tokens=longest,
        tensor_parallel=deploy.tensor_parallel,
        pipeline_parallel=deploy.pipeline_parallel,
    )


def _as_loaded(model: Model, deploy: Deployment) -> Model:
    """The model with the weights that the runtime makes of it on loading."""
    wanted = deploy.weight_dtype
    if wanted in (None, deploy.dtype or model.dtype):
        return model
    if model.quantization is not None:
        raise ConfigError(
            f"weight_dtype={wanted!r} is not allowed: the checkpoint is quantised already "
            f"({model.quantization.method})"
        )
    return replace(model, quantization=quantised_on_load(deploy.runtime, str(wanted)))


def _as_held(model: Model, deploy: Deployment, gpu: Gpu) -> Model:
    """The model with plain weights, where transformers dequantises them for want of kernels."""
    quantization = model.quantization
    if deploy.runtime != "transformers" or quantization is None:
        return model
    if isinstance(quantization, Gguf):  # modeling_gguf_pytorch_utils.py: always
        return replace(model, quantization=None)
    return replace(model, quantization=None) if unpacked_on(gpu, quantization.method) else model


def _unpacked_note(checkpoint: Model, gpu: Gpu) -> str:
    assert checkpoint.quantization is not None
    method = checkpoint.quantization.method
    return f"dequantised on loading: transformers 5.23 runs no {method} kernels on {gpu.label}"


def _quantised_note(model: Model) -> str:
    """What is left out of the peak and the times of quantised weights."""
    if model.quantization is None:
        return ""
    return f"approximate: the scratch of {model.quantization.method} kernels is not planned"


def _check_served(work: Inference, deploy: Deployment) -> None:
    """ConfigError for a sequence longer than the engine is set to take."""
    longest = deploy.max_model_tokens
    tokens = work.prompt_tokens + work.output_tokens
    if longest is not None and tokens > longest:
        raise ConfigError(
            f"prompt_tokens + output_tokens = {tokens} is more than max_model_tokens={longest}"
        )


def _block_tokens(deploy: Deployment) -> int:
    """The page of a paged cache, said once."""
    paged = deploy.cache.block_tokens if deploy.cache is not None else None
    if paged is None:
        return deploy.block_tokens
    if deploy.block_tokens not in (paged, DEFAULT_BLOCK_TOKENS):
        raise ConfigError(
            f"cache.block_tokens={paged} contradicts block_tokens={deploy.block_tokens}"
        )
    return paged


def _weight_rows(
    model: Model, runtime: Runtime, dtype: str, *, note: str, capability: str | None = None
) -> list[Row]:
    """One row for each group of parameters, then the runtime's buffers."""
    rows: Iterable[Row]
    match model.quantization:
        case None:
            rows = _plain_rows(model, dtype, note=note)
        case Gguf(held=held) if held and runtime.name == "llama.cpp":
            rows = _gguf_rows(held)
        case _:
            rows = _stored_rows(model, dtype)
            if note:
                rows = [replace(row, note=f"{row.note}; {note}") for row in rows]
    return [*rows, *runtime.buffer_rows(model, dtype=dtype, capability=capability)]


def _gguf_rows(held: tuple[tuple[str, int, int], ...]) -> Iterator[Row]:
    """One row for each ggml type of a GGUF file, with the bytes of its header."""
    for kind, tensors, size_bytes in held:
        yield Row(
            component="weights",
            item=f"{kind}, {tensors} tensor{'s' * (tensors > 1)} of the file",
            count=1,
            formula="bytes",
            values=(("bytes", size_bytes),),
            size_bytes=size_bytes,
            note="quantised: gguf",
        )


def _plain_rows(model: Model, dtype: str, *, note: str) -> list[Row]:
    b = element_bytes(dtype)
    return [
        Row(
            component="weights",
            item=f"{group.replace('_', ' ')}, {tensors} tensor{'s' * (tensors > 1)}",
            count=1,
            formula="parameters · b",
            values=(("parameters", elements), ("b", b)),
            size_bytes=elements * b,
            note=note,
        )
        for group, (tensors, elements) in model.parameter_groups().items()
    ]


@lru_cache(maxsize=128)
def _stored_rows(model: Model, dtype: str) -> tuple[Row, ...]:
    """Quantised weights: a row for each group, role and dtype of what is stored."""
    assert model.quantization is not None
    sizes: dict[tuple[str, str, str], tuple[int, int]] = {}
    for p, stored in model.stored_tensors(dtype):
        key = (p.group, stored.role, stored.dtype)
        tensors, size = sizes.get(key, (0, 0))
        sizes[key] = (tensors + stored.copies, size + stored.size_bytes)
    return tuple(
        Row(
            component="weights",
            item=f"{group.replace('_', ' ')}, {role}s in {stored}, "
            f"{tensors} tensor{'s' * (tensors > 1)}",
            count=1,
            formula="elements · b",
            values=(("elements", size // STORED_BYTES[stored]), ("b", STORED_BYTES[stored])),
            size_bytes=size,
            note=f"quantised: {model.quantization.method}",
        )
        for (group, role, stored), (tensors, size) in sizes.items()
    )


def _activation_rows(
    highest: Peak, phase: Phase, kv_bytes: int, *, note: str, apart: bool
) -> Iterator[Row]:
    """What lives at the peak besides weights and cache."""
    where = f"{phase.name}, {highest.op}" + (
        "" if highest.layer is None else f", layer {highest.layer}"
    )
    letters = symbols(phase.dims)
    for buffer, count, size in highest.live:
        text = formula(buffer.shape)
        used = set(re.findall(r"[A-Z]", text))
        yield Row(
            component="activations",
            item=buffer.name,
            count=count,
            formula=f"{text} · {buffer.itemsize}",
            values=tuple((name, number) for name, number in letters.items() if name in used),
            size_bytes=size,
            note="; ".join(part for part in (f"at the peak: {where}", note) if part),
        )
    difference = highest.cache_bytes - kv_bytes
    if difference and not apart:
        yield Row(
            component="activations",
            item="cache at the peak, beyond or short of the finished cache",
            count=1,
            formula="held − finished",
            values=(("held", highest.cache_bytes), ("finished", kv_bytes)),
            size_bytes=difference,
            note="old and new storages of a growing cache, whole prefills of sliding layers",
        )


def _torch_peaks(
    model: Model,
    work: Inference,
    setting: Setting,
    runtime: Runtime,
    gpu: Gpu,
    rows: tuple[Row, ...],
    highest: Peak,
) -> TorchPeaks:
    """The workload to be played through torch's allocator; where it is not, the sum of tensors.

    Not played: CPUs, pools, and the decode steps of quantised caches, which are not alike.
    """
    apart = runtime.pooled or not runtime.on_torch
    workspace = workspace_bytes(gpu) if runtime.on_torch else 0
    steps_differ = (
        work.output_tokens > 1 and runtime.name == "transformers" and is_quantised(setting)
    )
    if apart or gpu.vendor not in WITH_CONTEXT or steps_differ:
        pool = total_bytes(rows, "kv_cache") if apart else 0
        inputs = work.inputs_bytes if runtime.on_torch else 0
        live = total_bytes(rows, "weights") + highest.live_bytes + pool
        return Unsegmented(peak_allocated_bytes=live + inputs + workspace)
    outside = total_bytes(rows, "overhead") - workspace
    return AllocatorPlan(
        model=model,
        work=work,
        setting=setting,
        runtime=runtime.name,
        workspace_bytes=workspace,
        capacity_bytes=max(0, gpu.memory_bytes - outside),
    )


def _memory(
    rows: tuple[Row, ...], highest: Peak, torch: TorchPeaks, *, outside: int, apart: bool
) -> Memory:
    weights, kv = total_bytes(rows, "weights"), total_bytes(rows, "kv_cache")
    overhead, optimizer = total_bytes(rows, "overhead"), total_bytes(rows, "optimizer")
    live = highest.live_bytes + kv if apart else highest.live_bytes
    return Memory(
        weights_bytes=weights,
        kv_cache_bytes=kv,
        activations_bytes=total_bytes(rows, "activations"),
        gradients_bytes=total_bytes(rows, "gradients"),
        optimizer_bytes=optimizer,
        overhead_bytes=overhead,
        peak_live_bytes=weights + optimizer + live,
        torch=torch,
        outside_torch_bytes=outside,
    )
