"""What would make it fit: other settings, each planned, held against what the log printed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from planner.catalog.gpus import Gpu
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
SHORTER, MORE = "--max-model-len", "--tensor-parallel-size"
MOST_ANSWERS = 2  # of more GPUs: the least that fit, and the next


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
        answered = sum(remedy is not None and remedy.change.startswith(MORE) for remedy in found)
        enough = change.startswith(MORE) and answered == MOST_ANSWERS
        if gained <= 0 or (short and not fits) or enough:
            continue
        found.append(
            Remedy(
                change=change,
                effect=f"{pool.tokens:,} tokens (+{gained:,}), {pool.concurrency:.2f} × "
                f"{asked_tokens:,} at once",
                fits=fits,
            )
        )
    answers = [remedy for remedy in found if remedy is not None]
    single = [r for r in answers if not r.change.startswith((MORE, SHORTER))]
    if short and not single:  # no one change on these GPUs: several
        more = not any(remedy.change.startswith(MORE) for remedy in answers)
        answers += _together(model, deploy, before, asked_tokens, offset_bytes, more_gpus=more)
    return tuple(answers)


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
    return Remedy(change=f"{SHORTER} {low}", effect="one sequence of it fits", fits=True)


def _together(
    model: Model,
    deploy: Deployment,
    before: Estimate,
    asked_tokens: int,
    offset_bytes: int,
    *,
    more_gpus: bool,
) -> Iterator[Remedy]:
    """One change after the other until a sequence finds room."""
    changes: list[str] = []
    for change, fields in _cumulative(model, deploy, before):
        apart = change.startswith(MORE)
        if apart and not more_gpus:
            return
        changes = [c for c in changes if not (apart and c.startswith(MORE))]
        changes.append(change)
        deploy = replace(deploy, **fields)
        e = planned(model, deploy, asked_tokens)
        if e is None or e.pool is None:
            continue
        pool = _with_offset(e.pool, 0 if apart else offset_bytes)
        if pool.concurrency >= 1:
            times = f"{pool.concurrency:.2f} × {asked_tokens:,}"
            effect = f"{pool.tokens:,} tokens, {times} at once"
            yield Remedy(change=" ".join(changes), effect=effect, fits=True)
            return


def _cumulative(
    model: Model, deploy: Deployment, before: Estimate
) -> Iterator[tuple[str, dict[str, Any]]]:
    setting = before.setting
    highest = max(HIGHEST_UTILIZATION, deploy.memory_utilization)
    yield f"--gpu-memory-utilization {highest}", {"memory_utilization": highest}
    sequences, tokens = FEWER_SEQUENCES[-1], FEWER_TOKENS[-1]
    if sequences < setting.max_sequences and tokens < setting.max_batched_tokens:
        fewer = {"max_sequences": sequences, "max_batched_tokens": tokens}
        yield f"--max-num-seqs {sequences} --max-num-batched-tokens {tokens}", fewer
    if setting.kv_dtype != "fp8" and keeps_fp8(before.gpu):
        yield "--kv-cache-dtype fp8", {"kv_dtype": "fp8"}
    if model.quantization is None and deploy.weight_dtype is None:
        yield "--quantization fp8", {"weight_dtype": "fp8"}
    for gpus in MORE_GPUS:
        if gpus > deploy.tensor_parallel:
            yield f"{MORE} {gpus}", {"tensor_parallel": gpus, "gpus": 1}


def keeps_fp8(gpu: Gpu) -> bool:
    """Whether some backend has fp8 keys and values there: from Ampere on."""
    try:
        return float(gpu.compute_capability or 0) >= 8.0
    except ValueError:  # AMD's gfx names
        return True


def _others(model: Model, deploy: Deployment, before: Estimate) -> Iterator[tuple[str, Deployment]]:
    setting = before.setting
    if setting.kv_dtype != "fp8" and keeps_fp8(before.gpu):
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
    for gpus in MORE_GPUS:
        if gpus > deploy.tensor_parallel:
            yield f"{MORE} {gpus}", replace(deploy, tensor_parallel=gpus, gpus=1)
