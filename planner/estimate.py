"""The Estimate: what a workload needs in a deployment, every number opened down to its formula."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.activations import Peak, peak, peak_bytes
from planner.catalog.gpus import Gpu, gpu_named
from planner.dtypes import ELEMENT_BYTES, element_bytes
from planner.errors import ConfigError, check_choice, check_size, shown
from planner.ledger import Row, total_bytes
from planner.model import Model
from planner.program import Dims, formula, symbols
from planner.roofline import pass_cost
from planner.runtimes import runtime_named
from planner.runtimes.base import Phase, Runtime, Setting
from planner.runtimes.vllm import NON_TORCH_BYTES, block_bytes
from planner.workload import CacheSpec, Deployment, Inference

if TYPE_CHECKING:
    import pandas as pd

CONTEXT_BYTES = int(0.51 * 2**30)
"""A CUDA context before any tensor: 0.51 GiB in 42 of 42 single-GPU vLLM 0.19 start-up logs on
H100. Taken for every NVIDIA and AMD device until it is measured there."""

MAX_DECODE_POINTS = 64
"""Contexts at which a decode step is timed for the mean; all of them when there are fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Bytes of one GPU. The five parts are what the total is made of.

    `activations_bytes` is what the peak adds to weights and the finished cache; `peak_live_bytes`
    weights plus storages the passes create, `peak_allocated_bytes` that plus inputs and workspace.
    `peak_reserved_bytes` needs the allocator's simulation and is None until it exists.
    """

    weights_bytes: int
    kv_cache_bytes: int
    activations_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    overhead_bytes: int
    peak_live_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int | None
    device_used_bytes: int

    @property
    def total_bytes(self) -> int:
        """Weights, cache, activations, gradients, optimizer and overhead."""
        return (
            self.weights_bytes
            + self.kv_cache_bytes
            + self.activations_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.overhead_bytes
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Times by the plain roofline: `basis` says so. TPOT is the mean over the decode steps.

    `tpot_s` is None where there is no decode step (output_tokens = 1).
    """

    ttft_s: float
    tpot_s: float | None
    output_tokens_per_s: float
    basis: str = "uncalibrated roofline"


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """The answer for one model, workload and deployment.

    `peak` is the moment of the highest live memory and `peak_phase` the pass it lies in.
    `kv_pool_bytes` and `kv_pool_tokens` are vllm's pool, None elsewhere.
    """

    model: Model
    work: Inference
    deploy: Deployment
    setting: Setting
    gpu: Gpu
    memory: Memory
    latency: Latency
    peak: Peak
    peak_phase: str
    rows: tuple[Row, ...]
    kv_pool_bytes: int | None
    kv_pool_tokens: int | None

    @property
    def headroom_bytes(self) -> int:
        """What is left of the GPU's memory; of the pool's, in vllm. Negative: what is missing."""
        if self.kv_pool_bytes is not None:
            return self.kv_pool_bytes - self.memory.kv_cache_bytes
        return self.gpu.memory_bytes - self.memory.total_bytes

    @property
    def fits(self) -> bool:
        """Whether it fits: the total into memory; in vllm, this workload's blocks into the pool."""
        return self.headroom_bytes >= 0

    def table(self) -> pd.DataFrame:
        """The ledger: component, item, count, formula, substituted, bytes, note; parts sum up."""
        import pandas as pd

        columns = ["component", "item", "count", "formula", "substituted", "bytes", "note"]
        return pd.DataFrame(
            [
                [r.component, r.item, r.count, r.formula, r.substituted, r.size_bytes, r.note]
                for r in self.rows
            ],
            columns=columns,
        )

    def explain(self) -> str:
        """The estimate in words, one line a number."""
        from planner.report import explain

        return explain(self)

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV, safe to open in a spreadsheet."""
        from planner.report import write_csv

        write_csv(self.table(), path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return {
            "model": self.model.name,
            "parameter_count": self.model.parameter_count,
            "workload": asdict(self.work),
            "gpu": self.gpu.name,
            "runtime": f"{self.deploy.runtime} {runtime_named(self.deploy.runtime).version}",
            "attention": self.setting.attention,
            "dtype": self.setting.dtype,
            "kv_dtype": self.setting.kv_dtype,
            "memory": {**asdict(self.memory), "total_bytes": self.memory.total_bytes},
            "gpu_memory_bytes": self.gpu.memory_bytes,
            "headroom_bytes": self.headroom_bytes,
            "fits": self.fits,
            "kv_pool_bytes": self.kv_pool_bytes,
            "kv_pool_tokens": self.kv_pool_tokens,
            "latency": asdict(self.latency),
            "peak": {
                "phase": self.peak_phase,
                "op": self.peak.op,
                "layer": self.peak.layer,
                "live": [
                    {"name": name, "count": count, "bytes": size}
                    for name, count, size in self.peak.buffers
                ],
            },
            "defaults_taken": list(self.model.defaults),
            "rows": [
                {**asdict(r), "values": dict(r.values), "substituted": r.substituted}
                for r in self.rows
            ],
        }


def kv_cache_bytes(
    model: Model,
    *,
    batch: int,
    context_tokens: int,
    dtype: str = "bf16",
    runtime: str = "transformers",
    cache: CacheSpec | None = None,
    encoder_tokens: int | None = None,
) -> int:
    """Bytes of the KV cache of `batch` sequences of `context_tokens` tokens in a named runtime.

    Counts beyond the model's positions too. Raises ConfigError for sizes out of range, an unknown
    dtype or runtime, a kind of cache that the runtime lacks.
    """
    check_size("batch", batch)
    check_size("context_tokens", context_tokens, minimum=0)
    check_choice("dtype", dtype, ELEMENT_BYTES)
    if encoder_tokens is not None:
        raise ConfigError(
            f"encoder_tokens={shown(encoder_tokens)} is not allowed: None for {model.model_type}"
        )
    rows = runtime_named(runtime).cache_rows(
        model, batch=batch, context_tokens=context_tokens, dtype=dtype, cache=cache
    )
    return total_bytes(rows)


def estimate(model: Model, work: Inference, deploy: Deployment) -> Estimate:
    """Memory and latency of a workload. Something that does not fit is an answer, not an error.

    Raises ConfigError for what cannot run: a context beyond the model's positions, an attention
    backend that the model's class refuses, a quantised checkpoint without an explicit dtype.
    """
    model.check_positions(work.context_tokens)
    runtime, gpu = runtime_named(deploy.runtime), gpu_named(deploy.gpu)
    setting = _setting(model, deploy, runtime, gpu)
    cache = deploy.cache
    if deploy.runtime == "vllm" and cache is None:
        cache = CacheSpec(kind="paged", block_tokens=deploy.block_tokens)
    if cache is not None and cache.kind == "static" and deploy.runtime == "transformers":
        raise ConfigError(
            "cache.kind='static' is not planned for runtime=transformers yet: dynamic "
            "(kv_cache_bytes counts both)"
        )

    weights = _weight_rows(model, runtime, setting.dtype)
    kv = runtime.cache_rows(
        model,
        batch=work.batch,
        context_tokens=work.context_tokens,
        dtype=setting.kv_dtype,
        cache=cache,
    )
    phases = runtime.memory_phases(model, work, setting)
    phase = max(phases, key=lambda phase: peak_bytes(phase.program, phase.dims))
    highest = peak(phase.program, phase.dims)
    kv_bytes = total_bytes(kv)
    pooled = deploy.runtime == "vllm"
    activations = list(_activation_rows(highest, phase, kv_bytes, pooled=pooled))
    overhead = list(_overhead_rows(gpu, pooled=pooled))
    rows = (*weights, *kv, *activations, *overhead)
    memory = _memory(rows, highest, work, gpu, pooled=pooled)

    pool_bytes = pool_tokens = None
    if pooled:
        pool_bytes, pool_tokens = _pool(model, deploy, setting, gpu, memory)
        unused = max(0, pool_bytes - kv_bytes)
        memory = replace(memory, device_used_bytes=memory.total_bytes + unused)
    return Estimate(
        model=model,
        work=work,
        deploy=deploy,
        setting=setting,
        gpu=gpu,
        memory=memory,
        latency=_latency(model, work, setting, runtime, gpu),
        peak=highest,
        peak_phase=phase.name,
        rows=rows,
        kv_pool_bytes=pool_bytes,
        kv_pool_tokens=pool_tokens,
    )


def _setting(model: Model, deploy: Deployment, runtime: Runtime, gpu: Gpu) -> Setting:
    if model.quantization is not None:
        raise ConfigError(
            f"quantization_config.quant_method={model.quantization!r} is not planned yet: without "
            "quantization_config the weights are planned in dtype"
        )
    dtype = deploy.dtype or model.dtype
    return Setting(
        attention=runtime.attention(model, deploy.attention),
        dtype=dtype,
        kv_dtype=deploy.kv_dtype or dtype,
        device="cpu" if gpu.is_cpu else "cuda",
        max_batched_tokens=deploy.max_batched_tokens,
        max_sequences=deploy.max_sequences,
        multiprocessors=gpu.multiprocessors or 0,
    )


def _weight_rows(model: Model, runtime: Runtime, dtype: str) -> list[Row]:
    """One row for each group of parameters, then the runtime's buffers."""
    b = element_bytes(dtype)
    sizes = model.parameter_groups()
    rows = [
        Row(
            component="weights",
            item=f"{group.replace('_', ' ')}, {tensors} tensors",
            count=1,
            formula="parameters · b",
            values=(("parameters", elements), ("b", b)),
            size_bytes=elements * b,
        )
        for group, (tensors, elements) in sizes.items()
    ]
    return [*rows, *runtime.buffer_rows(model, dtype=dtype)]


def _activation_rows(highest: Peak, phase: Phase, kv_bytes: int, *, pooled: bool) -> Iterator[Row]:
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
            note=f"at the peak: {where}",
        )
    difference = highest.cache_bytes - kv_bytes
    if difference and not pooled:
        yield Row(
            component="activations",
            item="cache at the peak, beyond or short of the finished cache",
            count=1,
            formula="held − finished",
            values=(("held", highest.cache_bytes), ("finished", kv_bytes)),
            size_bytes=difference,
            note="old and new storages of a growing cache, whole prefills of sliding layers",
        )


def _overhead_rows(gpu: Gpu, *, pooled: bool) -> Iterator[Row]:
    if gpu.is_cpu:
        return

    def row(item: str, size: int, note: str) -> Row:
        return Row(
            component="overhead",
            item=item,
            count=1,
            formula="constant",
            values=(("constant", size),),
            size_bytes=size,
            note=note,
        )

    yield row(
        "device context", CONTEXT_BYTES, "42 vLLM 0.19 start-up logs on H100; not measured here"
    )
    if pooled:
        yield row("outside torch", NON_TORCH_BYTES, "18 vLLM 0.19 start-up logs on H100, median")
    else:
        yield row(
            "cuBLAS workspace",
            workspace_bytes(gpu),
            "32 MiB from sm_90 on, 8.125 MiB before: torch 2.13, CublasHandlePool.cpp",
        )


def workspace_bytes(gpu: Gpu) -> int:
    """The cuBLAS workspace that torch allocates at the first matrix product; none on a CPU."""
    if gpu.is_cpu:
        return 0
    try:
        hopper_or_later = float(gpu.compute_capability or 0) >= 9.0
    except ValueError:  # AMD's gfx names
        hopper_or_later = False
    return 32 * 2**20 if hopper_or_later else 8_519_680


def _memory(
    rows: tuple[Row, ...], highest: Peak, work: Inference, gpu: Gpu, *, pooled: bool
) -> Memory:
    weights, kv = total_bytes(rows, "weights"), total_bytes(rows, "kv_cache")
    activations, overhead = total_bytes(rows, "activations"), total_bytes(rows, "overhead")
    live = weights + (highest.live_bytes + kv if pooled else highest.live_bytes)
    inputs = 8 * work.batch * work.prompt_tokens  # token ids, int64
    return Memory(
        weights_bytes=weights,
        kv_cache_bytes=kv,
        activations_bytes=activations,
        gradients_bytes=0,
        optimizer_bytes=0,
        overhead_bytes=overhead,
        peak_live_bytes=live,
        peak_allocated_bytes=live + inputs + workspace_bytes(gpu),
        peak_reserved_bytes=None,
        device_used_bytes=weights + kv + activations + overhead,
    )


def _pool(
    model: Model, deploy: Deployment, setting: Setting, gpu: Gpu, memory: Memory
) -> tuple[int, int]:
    """(bytes, tokens) of vLLM's pool: utilisation · memory − weights − peak − outside torch.

    The context is not subtracted (vLLM 0.19 snapshots the device after creating it).
    """
    budget = int(gpu.memory_bytes * deploy.memory_utilization)
    available = budget - memory.weights_bytes - memory.activations_bytes
    available -= 0 if gpu.is_cpu else NON_TORCH_BYTES
    block = deploy.block_tokens
    each = block_bytes(model, dtype=setting.kv_dtype, block_tokens=block)
    blocks = max(0, available) // each
    per_request = runtime_named("vllm").cache_rows(
        model,
        batch=1,
        context_tokens=model.max_position_embeddings,
        dtype=setting.kv_dtype,
        cache=CacheSpec(kind="paged", block_tokens=block),
    )
    groups = sum(row.count for row in per_request)
    return blocks * each, blocks // groups * block


def _latency(
    model: Model, work: Inference, setting: Setting, runtime: Runtime, gpu: Gpu
) -> Latency:
    prompt = Dims(batch=work.batch, tokens=work.prompt_tokens, context=work.prompt_tokens)
    first = pass_cost(runtime.prefill(model, work, setting), prompt, gpu, dtype=setting.dtype)
    ttft_s = float(first.time_s)
    steps = work.output_tokens - 1
    tpot_s = None
    if steps:
        contexts = np.linspace(
            work.prompt_tokens + 1, work.context_tokens, min(steps, MAX_DECODE_POINTS)
        )
        dims = Dims(batch=float(work.batch), tokens=1.0, context=contexts)
        step = pass_cost(runtime.decode(model, work, setting), dims, gpu, dtype=setting.dtype)
        tpot_s = float(np.mean(step.time_s))
    total_s = ttft_s + steps * (tpot_s or 0.0)
    return Latency(
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        output_tokens_per_s=work.batch * work.output_tokens / total_s,
    )
