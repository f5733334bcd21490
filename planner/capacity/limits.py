"""Inverse questions as numbers: the largest context or batch such that it and every smaller fits.

Memory mostly grows with both, and a search by halves finds where it ends. It does not always: vLLM
gives back blocks behind a window or chunk, so that one token more may take a block less. So what
the search finds is held against every smaller number, all at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from planner.errors import MAX_SIZE, ConfigError
from planner.estimate import estimate
from planner.model import Model
from planner.prepared import Prepared, check_asked, prepare
from planner.sweeps.grid import Cells, Workloads, memory_grid, takes_arrays
from planner.workload import Deployment, Inference, Training

CHUNK, MAX_CHECKED = 1 << 17, 1 << 21
"""Numbers that are held against the memory at once, and in all."""
SHARDS = tuple(2**i for i in range(1, 13))
"""Data-parallel shards that are tried."""


def max_context_tokens(model: Model, work: Inference | Training, deploy: Deployment) -> int:
    """The longest context (prompt + output − 1) at this batch and output length; 0 if none fits.

    The prompt grows, the output stays; it ends at the model's positions. In training, the longest
    sequence.
    """
    check_asked(model, work, deploy)
    if isinstance(work, Training):
        step = work

        def trains(sequence_tokens: int) -> bool:
            tokens = max(sequence_tokens, 2)  # one alone predicts nothing
            return estimate(model, replace(step, sequence_tokens=tokens), deploy).fits

        return _largest(trains, model.max_position_embeddings or MAX_SIZE)
    steps, inference = work.output_tokens - 1, work
    limit = prepare(model, deploy).longest_context_tokens() - steps

    def fits(prompt_tokens: int) -> bool:
        return estimate(model, replace(inference, prompt_tokens=prompt_tokens), deploy).fits

    def prompts(n: Cells) -> Workloads:
        return _workloads(inference, batch=np.full(n.shape, float(inference.batch)), prompt=n)

    prompt = _without_gaps(model, deploy, _largest(fits, limit), prompts)
    return prompt + steps if prompt else 0


def max_batch(model: Model, work: Inference | Training, deploy: Deployment) -> int:
    """The largest batch at these lengths; 0 if not even one sequence fits."""
    check_asked(model, work, deploy)

    def fits(batch: int) -> bool:
        return estimate(model, replace(work, batch=batch), deploy).fits

    largest = _largest(fits, MAX_SIZE)
    if isinstance(work, Training):
        return largest
    inference = work

    def batches(n: Cells) -> Workloads:
        prompt = np.full(n.shape, float(inference.prompt_tokens))
        return _workloads(inference, batch=n, prompt=prompt)

    return _without_gaps(model, deploy, largest, batches)


def min_gpus(model: Model, work: Inference | Training, deploy: Deployment) -> int | None:
    """The fewest GPUs that hold one copy of the model with this workload; None if no layout does.

    Where the runtime plans several (vllm): tensor times pipeline parallel, the widest tensor
    parallel first. Of a deployment with data-parallel shards: as few of them, a power of two.
    """
    found = smallest_layout(model, work, deploy)
    return None if found is None else found.world_size


def smallest_layout(
    model: Model, work: Inference | Training, deploy: Deployment
) -> Deployment | None:
    """The deployment with the fewest GPUs that fits; None where none does."""
    check_asked(model, work, deploy)
    if deploy.data_parallel_shards > 1:
        sharded = (replace(deploy, data_parallel_shards=n, gpus=1) for n in SHARDS)
        return next((tried for tried in sharded if estimate(model, work, tried).fits), None)
    for tp, pp in layouts(deploy):
        tried = replace(deploy, tensor_parallel=tp, pipeline_parallel=pp, gpus=1)
        try:
            if estimate(model, work, tried).fits:
                return tried
        except ConfigError:
            if (tp, pp) == (1, 1):  # not for the layout's sake
                raise
    return None


def layouts(deploy: Deployment) -> list[tuple[int, int]]:
    """(tensor, pipeline) parallel from one GPU on: powers of two, tensors within a node of 8."""
    if deploy.runtime != "vllm":
        return [(1, 1)]
    every = [(tp, pp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4, 8, 16)]
    return sorted(every, key=lambda layout: (layout[0] * layout[1], -layout[0]))


def _workloads(work: Inference, *, batch: Cells, prompt: Cells) -> Workloads:
    return Workloads(
        batch=batch,  # type: ignore[arg-type]
        prompt_tokens=prompt,  # type: ignore[arg-type]
        output_tokens=work.output_tokens,
        logits=work.logits,
        encoder_tokens=work.encoder_tokens,
        padded=work.padded,
        float32_logits=work.float32_logits,
    )


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n ≤ limit with fits(n) where memory grows with n."""
    if limit < 1 or not fits(1):
        return 0
    low, high = 1, 2
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _without_gaps(
    model: Model, deploy: Deployment, largest: int, workloads: Callable[[Cells], Workloads]
) -> int:
    """The largest number below the first that does not fit."""
    prepared = prepare(model, deploy)
    if not takes_arrays(prepared):
        return largest
    for start in range(1, min(largest, MAX_CHECKED) + 1, CHUNK):
        n = np.arange(start, min(start + CHUNK, largest + 1), dtype=np.float64)
        fits = _fits(prepared, workloads(n))
        if not fits.all():
            return start + int(np.argmin(fits)) - 1
    return largest


def _fits(prepared: Prepared, work: Workloads) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    return np.asarray(memory_grid(prepared, work).fits)
