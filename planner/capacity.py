"""Inverse questions: the largest context or batch such that it and every smaller one fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.errors import MAX_SIZE
from planner.estimate import estimate
from planner.model import Model
from planner.workload import Deployment, Inference, Training


def max_context_tokens(model: Model, work: Inference | Training, deploy: Deployment) -> int:
    """The longest context (prompt + output − 1) at this batch and output length; 0 if none fits.

    The prompt grows, the output stays; it ends at the model's positions. In training, the longest
    sequence.
    """
    if isinstance(work, Training):
        step = work

        def trains(sequence_tokens: int) -> bool:
            return estimate(model, replace(step, sequence_tokens=sequence_tokens), deploy).fits

        return _largest(trains, model.max_position_embeddings or MAX_SIZE)
    steps = work.output_tokens - 1
    longest = (model.max_position_embeddings or MAX_SIZE) - steps

    inference = work

    def fits(prompt_tokens: int) -> bool:
        return estimate(model, replace(inference, prompt_tokens=prompt_tokens), deploy).fits

    prompt = _largest(fits, longest)
    return prompt + steps if prompt else 0


def max_batch(model: Model, work: Inference | Training, deploy: Deployment) -> int:
    """The largest batch at these lengths; 0 if not even one sequence fits."""

    def fits(batch: int) -> bool:
        return estimate(model, replace(work, batch=batch), deploy).fits

    return _largest(fits, MAX_SIZE)


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n ≤ limit with fits(n); memory grows with n in both callers."""
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
