"""How many requests run at once: vllm's pool against what they hold, the others' largest batch.

In vllm n requests that run at a moment hold n independent draws of B, the bytes of one request at
a random step of its life: n · E[B] + z · √n · σ(B) of them at most in a share p of moments, with z
the p-quantile of the normal distribution. Where more would run, vLLM preempts: nothing fails.
Runtimes without a pool run a batch padded to its longest request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from planner.capacity.limits import max_batch
from planner.capacity.traffic import Traffic
from planner.errors import ConfigError, shown
from planner.estimate import estimate
from planner.model import Model
from planner.prepared import Prepared, prepare
from planner.sweeps.grid import Cells, Workloads, memory_grid
from planner.workload import Deployment, Inference

STEPS_SEEN = 64
"""Steps of one kind of request that stand for all of them, evenly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Concurrency:
    """`requests` run at once; `worst_case` if all were at the end of the longest.

    `mean_bytes` and `deviation_bytes`: the cache of one at a random moment, None without a pool.
    `binding` says what ends it.
    """

    requests: int
    worst_case: int
    binding: str
    mean_bytes: float | None = None
    deviation_bytes: float | None = None


def concurrent_requests(
    model: Model, traffic: Traffic, deploy: Deployment, *, probability: float = 0.99
) -> Concurrency:
    """The most requests that run at once without preemption in a share of `probability` of moments.

    Raises ConfigError for requests that the model or the engine refuses.
    """
    if not (isinstance(probability, float) and 0.5 <= probability < 1):
        raise ConfigError(f"probability={shown(probability)} is not allowed: from 0.5 to below 1")
    prompt, output = traffic.longest
    longest = Inference(batch=1, prompt_tokens=prompt, output_tokens=output, logits="last")
    prepared = prepare(model, deploy)
    limit = prepared.longest_context_tokens()
    most = max(p + o - 1 for p, o, _ in traffic.requests)
    if most > limit:
        raise ConfigError(
            f"prompt_tokens + output_tokens - 1 = {most} of the longest request reaches beyond "
            f"{limit} of {model.name}"
        )
    if not prepared.runtime.pooled:
        batch = max_batch(model, longest, deploy)
        return Concurrency(
            requests=batch,
            worst_case=batch,
            binding="memory, at a batch padded to the longest prompt and output",
        )
    whole = _clipped(longest, limit)
    pool = estimate(model, whole, deploy).kv_pool_bytes or 0
    held, weights = _held_bytes(prepared, traffic)
    total = weights.sum()
    mean = float((held * weights).sum() / total)
    deviation = math.sqrt(max(0.0, float((held**2 * weights).sum() / total) - mean**2))
    fitting = _largest(pool, mean, deviation, NormalDist().inv_cdf(probability))
    seats = prepared.setting.max_sequences
    return Concurrency(
        requests=min(fitting, seats),
        worst_case=min(int(pool // held.max()), seats),
        binding="max_sequences" if fitting > seats else "KV pool",
        mean_bytes=mean,
        deviation_bytes=deviation,
    )


def max_concurrent_requests(
    model: Model, traffic: Traffic, deploy: Deployment, *, probability: float = 0.99
) -> int:
    """`concurrent_requests` as a number."""
    return concurrent_requests(model, traffic, deploy, probability=probability).requests


def _clipped(work: Inference, limit: int) -> Inference:
    """A workload whose prompt and output need not belong to one request."""
    over = work.context_tokens - limit
    if over <= 0:
        return work
    return Inference(
        batch=1,
        prompt_tokens=max(1, work.prompt_tokens - over),
        output_tokens=min(work.output_tokens, limit),
        logits="last",
    )


def _held_bytes(prepared: Prepared, traffic: Traffic) -> tuple[Cells, Cells]:
    """Bytes of one request at some of its steps, and how often a moment finds it there."""
    contexts, weights = [], []
    for prompt, output, number in traffic.requests:
        steps = min(output, STEPS_SEEN)
        contexts.append(np.floor(np.linspace(prompt, prompt + output - 1, steps)))
        weights.append(np.full(steps, number * output / steps))
    context = np.concatenate(contexts)
    work = Workloads(
        batch=np.ones(len(context)),  # type: ignore[arg-type]
        prompt_tokens=context,  # type: ignore[arg-type]
        output_tokens=1,
        logits="last",
    )
    held = memory_grid(prepared, work).kv_cache_bytes
    return held, np.concatenate(weights)


def _largest(pool: int, mean: float, deviation: float, z: float) -> int:
    """The largest n with n · mean + z · √n · deviation ≤ pool."""
    if mean <= 0:
        return 0
    root = (-z * deviation + math.sqrt((z * deviation) ** 2 + 4 * mean * pool)) / (2 * mean)
    n = max(0, int(root * root))
    while (n + 1) * mean + z * math.sqrt(n + 1) * deviation <= pool:
        n += 1
    while n and n * mean + z * math.sqrt(n) * deviation > pool:
        n -= 1
    return n
