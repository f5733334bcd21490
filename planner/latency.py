"""TTFT, TPOT and the time of a training step from the cost of the passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from planner.catalog.gpus import Gpu
from planner.model import Model
from planner.program import Dims, Number, Program
from planner.roofline import pass_cost
from planner.runtimes import runtime_named
from planner.runtimes.base import Setting
from planner.training import training_phase
from planner.workload import Deployment, Inference, Training

MAX_DECODE_POINTS = 64
"""Contexts at which a decode step is timed for the mean; all of them when there are fewer."""

BASIS = "uncalibrated roofline"


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Times by the plain roofline: `basis` says so. TPOT is the mean over the decode steps.

    `tpot_s` is None where there is no decode step (output_tokens = 1). A training step has
    `step_s` and `trained_tokens_per_s` and nothing else.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    output_tokens_per_s: float | None = None
    step_s: float | None = None
    trained_tokens_per_s: float | None = None
    basis: str = BASIS


@lru_cache(maxsize=256)
def latency(model: Model, work: Inference, setting: Setting, runtime: str, gpu: Gpu) -> Latency:
    """The times of one workload."""
    return times(model, work, setting, runtime, gpu)


def times(model: Model, work: Inference, setting: Setting, runtime: str, gpu: Gpu) -> Latency:
    """One prefill of the prompt, then output_tokens − 1 steps, each over one token more.

    A pass goes through pipeline stages one after the other, each GPU with its share. The sizes of
    `work` may be arrays of one shape; so are the times then.
    """
    rules = runtime_named(runtime)
    stages = [
        share.model
        for share in rules.shares(model, setting.tensor_parallel, setting.pipeline_parallel)
    ]

    def seconds(program: Callable[..., Program], dims: Dims) -> Number:
        """A pass through all stages, one after the other."""
        return sum(
            pass_cost(program(stage, work, setting), dims, gpu, dtype=setting.dtype).time_s
            for stage in stages
        )

    encoder = model.encoder_length(work.encoder_tokens, work.prompt_tokens)
    prompt = Dims(
        batch=work.batch, tokens=work.prompt_tokens, context=work.prompt_tokens, encoder=encoder
    )
    ttft_s = seconds(rules.prefill, prompt)
    steps = work.output_tokens - 1
    tpot_s = None
    if steps:
        first, last = work.prompt_tokens + 1, work.context_tokens
        contexts = np.linspace(first, last, min(steps, MAX_DECODE_POINTS), axis=-1)
        batch = np.asarray(work.batch, dtype=np.float64)[..., None]
        read = np.asarray(encoder, dtype=np.float64)[..., None]
        step_s = seconds(
            rules.decode, Dims(batch=batch, tokens=1.0, context=contexts, encoder=read)
        )
        tpot_s = np.mean(np.broadcast_to(step_s, contexts.shape), axis=-1)
    total_s = ttft_s + steps * (0.0 if tpot_s is None else tpot_s)
    alone = np.ndim(total_s) == 0
    return Latency(
        ttft_s=float(ttft_s) if alone else ttft_s,
        tpot_s=float(tpot_s) if alone and tpot_s is not None else tpot_s,
        output_tokens_per_s=work.batch * work.output_tokens / total_s,
        basis=BASIS if setting.is_one_gpu else f"{BASIS}, without communication",
    )


@lru_cache(maxsize=256)
def training_latency(
    model: Model, work: Training, deploy: Deployment, setting: Setting, gpu: Gpu
) -> Latency:
    """One step: forward, backward and optimizer."""
    phase = training_phase(model, work, deploy, setting)
    step_s = float(pass_cost(phase.program, phase.dims, gpu, dtype=setting.dtype).time_s)
    tokens = work.batch * work.sequence_tokens
    return Latency(step_s=step_s, trained_tokens_per_s=tokens / step_s)
