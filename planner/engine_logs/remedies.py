"""What would make it fit: other settings, each planned, held against what the log printed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from planner.engine_logs.explanation import Remedy
from planner.engine_logs.planning import planned
from planner.model import Model
from planner.result import Estimate
from planner.runtimes.base import Pool
from planner.workload import Deployment

HIGHEST_UTILIZATION = 0.95
FEWER_SEQUENCES = (256, 64, 16)
FEWER_TOKENS = (2048, 512)
MORE_GPUS = (2, 4, 8, 16)


def remedies(
    model: Model, deploy: Deployment, *, asked_tokens: int, offset_bytes: int
) -> tuple[Remedy, ...]:
    """Changes that give room for one sequence of `asked_tokens`, or more of it.

    `offset_bytes`: by how much the printed pool is larger than the planned one; taken to stay so.
    """
    before = planned(model, deploy, asked_tokens)
    if before is None or before.pool is None:
        return ()
    start = _with_offset(before.pool, offset_bytes)
    short = start.concurrency < 1
    found = []
    if short:
        found.append(_longest(model, deploy, start, asked_tokens, offset_bytes))
    for change, other in _others(model, deploy, before):
        e = planned(model, other, asked_tokens)
        if e is None or e.pool is None:
            continue
        pool = _with_offset(e.pool, offset_bytes if e.deploy.world_size == deploy.world_size else 0)
        fits = pool.concurrency >= 1
        gained = pool.tokens - start.tokens
        if gained <= 0 or (short and not fits):
            continue
        found.append(
            Remedy(
                change=change,
                effect=f"{pool.tokens:,} tokens (+{gained:,}), {pool.concurrency:.2f} × "
                f"{asked_tokens:,} at once",
                fits=fits,
            )
        )
    return tuple(remedy for remedy in found if remedy is not None)


def _with_offset(pool: Pool, offset_bytes: int) -> Pool:
    return replace(pool, available_bytes=pool.available_bytes + offset_bytes)


def _longest(
    model: Model, deploy: Deployment, pool: Pool, asked_tokens: int, offset_bytes: int
) -> Remedy | None:
    """The longest max_model_len of which one sequence finds room."""
    if not pool.blocks:
        return None

    def room(tokens: int) -> bool:
        e = planned(model, replace(deploy, max_model_tokens=tokens), tokens)
        if e is None or e.pool is None:
            return False
        return _with_offset(e.pool, offset_bytes).concurrency >= 1

    low, high = 0, asked_tokens
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if room(middle) else (low, middle)
    if not low:
        return None
    return Remedy(change=f"--max-model-len {low}", effect="one sequence of it fits", fits=True)


def _others(model: Model, deploy: Deployment, before: Estimate) -> Iterator[tuple[str, Deployment]]:
    setting = before.setting
    if setting.kv_dtype != "fp8":
        yield "--kv-cache-dtype fp8", replace(deploy, kv_dtype="fp8")
    if deploy.memory_utilization < HIGHEST_UTILIZATION:
        yield (
            f"--gpu-memory-utilization {HIGHEST_UTILIZATION}",
            replace(deploy, memory_utilization=HIGHEST_UTILIZATION),
        )
    fewer = next((n for n in FEWER_SEQUENCES if n < setting.max_sequences), None)
    if fewer is not None:
        yield f"--max-num-seqs {fewer}", replace(deploy, max_sequences=fewer)
    smaller = next((n for n in FEWER_TOKENS if n < setting.max_batched_tokens), None)
    if smaller is not None and smaller >= setting.max_sequences:  # vLLM asks for it
        yield f"--max-num-batched-tokens {smaller}", replace(deploy, max_batched_tokens=smaller)
    if fewer is not None and smaller is not None:
        yield (
            f"--max-num-seqs {fewer} --max-num-batched-tokens {smaller}",
            replace(deploy, max_sequences=fewer, max_batched_tokens=smaller),
        )
    if model.quantization is None and deploy.weight_dtype is None:
        yield "--quantization fp8", replace(deploy, weight_dtype="fp8")
    more = [n for n in MORE_GPUS if n > deploy.tensor_parallel]
    for gpus in more[:2]:
        yield f"--tensor-parallel-size {gpus}", replace(deploy, tensor_parallel=gpus, gpus=1)
