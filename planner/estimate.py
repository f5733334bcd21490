"""Joins model, workload and deployment into an Estimate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from planner.activations import Peak, peak, peak_bytes
from planner.catalog.gpus import Gpu, gpu_named
from planner.dtypes import COMPUTE_DTYPES, KV_DTYPES
from planner.errors import MAX_SIZE, check_choice, check_kind, check_size
from planner.kbit import kbit_rows
from planner.ledger import Row, total_bytes
from planner.model import Model
from planner.overhead import WITH_CONTEXT, outside_torch_bytes, overhead_rows, workspace_bytes
from planner.parallel import Share
from planner.prepared import (
    Prepared,
    as_loaded,
    check_accumulation,
    check_asked,
    check_padded,
    check_unfrozen,
    prepare,
    setting_of,
)
from planner.program import formula, symbols
from planner.reserved import AllocatorPlan
from planner.result import Estimate, Memory, TorchPeaks, Unsegmented
from planner.runtimes import runtime_named
from planner.runtimes.base import Phase, Runtime, Setting
from planner.runtimes.transformers import is_quantised
from planner.runtimes.writer import INT64
from planner.trained.loss_scaling import scaler_row
from planner.trained.optimizers import copies_rows, optimizer_rows
from planner.trained.sharding import shard_rows
from planner.training import (
    adapter_rows,
    as_built,
    gradient_rows,
    training_phase,
    unfinished_row,
)
from planner.weights import weight_rows
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
    check_kind("model", model, Model)
    if cache is not None:
        check_kind("cache", cache, CacheSpec)
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
        encoder_tokens=model.encoder_length(encoder_tokens, context_tokens),
        compute_dtype=computed,
        decoded_tokens=decoded_tokens,
    )
    return total_bytes(rows)


def estimate(model: Model, work: Inference | Training, deploy: Deployment) -> Estimate:
    """Memory and latency of a workload. Something that does not fit is an answer, not an error.

    Raises ConfigError for what cannot run: a context beyond the model's positions, an attention
    backend that the model's class refuses, a quantised checkpoint.
    """
    check_asked(model, work, deploy)
    if isinstance(work, Training):
        return _of_training(as_loaded(model, deploy), work, deploy)
    prepared = prepare(model, deploy)
    prepared.check(work)
    return min((_of_share(share, prepared, work) for share in prepared.shares()), key=_room)


def _room(estimate: Estimate) -> tuple[int, int]:
    """What a GPU has left, to find the worst: blocks of a pool, else memory."""
    pool = estimate.pool
    free = estimate.gpu.memory_bytes - estimate.memory.total_bytes
    return (MAX_SIZE, free) if pool is None else (pool.blocks, pool.available_bytes)


def _of_share(share: Share, prepared: Prepared, work: Inference) -> Estimate:
    """The estimate of one GPU, which holds a share of the model."""
    runtime, gpu, setting = prepared.runtime, prepared.gpu, prepared.setting
    weights, overhead = prepared.fixed_rows(share)
    kv = prepared.cache_rows(share, work)
    phases = prepared.phases(share, work)
    phase = max(phases, key=lambda phase: peak_bytes(phase.program, phase.dims))
    highest = peak(phase.program, phase.dims)
    kv_bytes, note, apart = total_bytes(kv), prepared.peak_note, prepared.apart
    activations = list(_activation_rows(highest, phase, kv_bytes, note=note, apart=apart))
    rows = (*weights, *kv, *activations, *overhead)
    torch = _torch_peaks(prepared.model, work, setting, runtime, gpu, rows, highest)
    outside = outside_torch_bytes(rows)
    memory = _memory(rows, highest, torch, outside=outside, apart=apart)
    pool = prepared.pool(share, held_bytes=memory.weights_bytes + memory.activations_bytes)
    if pool is not None:
        memory = replace(memory, unused_pool_bytes=max(0, pool.size_bytes - kv_bytes))
    return Estimate(
        model=prepared.model,
        share=share,
        work=work,
        deploy=prepared.deploy,
        setting=setting,
        gpu=gpu,
        memory=memory,
        peak=highest,
        peak_phase=phase.name,
        rows=rows,
        pool=pool,
        peak_note=note,
    )


def _of_training(model: Model, work: Training, deploy: Deployment) -> Estimate:
    """One training step. Gradients count whole; what they lack at the peak is activations' own."""
    narrows = work.precision == "autocast" or (work.precision == "master" and model.dtype == "fp32")
    if narrows and deploy.dtype is None:
        deploy = replace(deploy, dtype="bf16")
    model, work = as_built(model, work, deploy)
    runtime, gpu = runtime_named(deploy.runtime), gpu_named(deploy.gpu)
    setting = setting_of(model, deploy, runtime, gpu)
    check_padded(work, runtime.name)
    check_accumulation(work, runtime.name)
    check_unfrozen(work, runtime.name)
    phase = training_phase(model, work, deploy, setting)
    highest = peak(phase.program, phase.dims)
    held_dtype = setting.held_dtype(work)
    if setting.sharding is not None:
        buffers = runtime.buffer_rows(model, dtype=held_dtype)
        weights = [*shard_rows(model, setting.sharding), *buffers]
    elif model.quantization is None:
        weights = weight_rows(model, runtime, held_dtype, note="")
    else:
        weights = kbit_rows(model, runtime, held_dtype, setting.dtype)
    adapted = adapter_rows(model, work, setting.dtype)
    gradients = gradient_rows(model, work, adapted or weights, setting.dtype)
    rows = (
        *weights,
        *adapted,
        *gradients,
        *copies_rows(model, work),
        *optimizer_rows(
            model,
            work,
            dtype=setting.dtype,
            device=setting.device,
            sharding=setting.sharding,
        ),
        *([scaler_row()] if work.scales_loss(setting.dtype) else []),
        *_activation_rows(highest, phase, 0, note=phase.note, apart=False),
        *unfinished_row(highest, gradients),
        *overhead_rows(gpu, attention=setting.attention, dtype=setting.dtype, trains=True),
    )
    held = total_bytes(rows, "weights") + total_bytes(rows, "optimizer") + highest.live_bytes
    torch: TorchPeaks = Unsegmented(peak_allocated_bytes=held + _inputs_bytes(model, work))
    if gpu.vendor in WITH_CONTEXT:
        torch = AllocatorPlan(
            model=model,
            work=work,
            setting=setting,
            runtime=runtime.name,
            workspace_bytes=workspace_bytes(gpu),
            capacity_bytes=max(0, gpu.memory_bytes - outside_torch_bytes(rows)),
        )
    return Estimate(
        model=model,
        share=Share(model=model, whole=model, shards=deploy.data_parallel_shards),
        work=work,
        deploy=deploy,
        setting=setting,
        gpu=gpu,
        memory=_memory(rows, highest, torch, outside=outside_torch_bytes(rows), apart=False),
        peak=highest,
        peak_phase=highest.phase,
        rows=rows,
        pool=None,
        peak_note=phase.note,
    )


def _inputs_bytes(model: Model, work: Inference | Training) -> int:
    """Token ids and labels, int64; of a sequence-to-sequence model those of both sides."""
    if not model.is_seq2seq:
        return work.inputs_bytes
    tokens = work.sequence_tokens if isinstance(work, Training) else work.prompt_tokens
    encoded: int = model.encoder_length(work.encoder_tokens, tokens)
    return INT64 * work.batch * (tokens + encoded)


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
        used = set(re.findall(r"[A-Z]\w*", text))
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

    Not played: CPUs, pools, and the decode steps over quanto's and hqq's caches: most of them keep
    a token as it is, the others quantise all anew.
    """
    apart = runtime.pooled or not runtime.on_torch
    workspace = workspace_bytes(gpu) if runtime.on_torch else 0
    in_groups = runtime.name == "transformers" and is_quantised(setting)
    steps_differ = work.output_tokens > 1 and in_groups and setting.kv_dtype != "fp8"
    if apart or gpu.vendor not in WITH_CONTEXT or steps_differ:
        pool = total_bytes(rows, "kv_cache") if apart else 0
        inputs = _inputs_bytes(model, work) if runtime.on_torch else 0
        live = total_bytes(rows, "weights") + highest.live_bytes + pool
        return Unsegmented(peak_allocated_bytes=live + inputs + workspace)
    return AllocatorPlan(
        model=model,
        work=work,
        setting=setting,
        runtime=runtime.name,
        workspace_bytes=workspace,
        capacity_bytes=max(0, gpu.memory_bytes - outside_torch_bytes(rows)),
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
