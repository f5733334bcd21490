"""TTFT, TPOT, throughput, utilisation and energy from the times of the passes.

TTFT: one prefill of all prompts, from the moment they are there. An engine with a pool (vLLM) takes
at most `max_batched_tokens` in a pass: so many passes, each as long as the mean one, over whole
prompts where they fit, else over a chunk of one at the mean of the chunks' contexts. TPOT: the mean
over the decode steps, each over one token more than the last. End to end: TTFT and
output_tokens − 1 steps. MFU: FLOPs over time · peak; MBU: bytes over time · bandwidth, over the
whole workload, of all GPUs. What an engine's scheduler does between the passes is not in any of
them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from planner.catalog.gpus import Gpu
from planner.model import Model
from planner.program import OPTIMIZER_STEP, Dims, Number, Program
from planner.runtimes import runtime_named
from planner.runtimes.base import Phase, Setting, clock_capacity
from planner.timing.calibration import Calibration
from planner.timing.calibration_files import Stamp
from planner.timing.clock import Speed
from planner.timing.collectives import MEASURED
from planner.timing.passes import Passes, PassTime, passes_of, prompt_passes
from planner.training import training_phase
from planner.workload import Deployment, Inference, Training

MAX_DECODE_POINTS = 16
"""Contexts at which a decode step is timed for the mean; all of them when there are fewer."""

UNCALIBRATED = "uncalibrated roofline"
UNTIMED = f"not planned: more than {max(MEASURED)} shards cross hosts, by a network unknown here"
"""Of sharded training."""
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Times of a workload. TPOT is the mean over the decode steps.

    `tpot_s` is None where there is no decode step (output_tokens = 1). A training step has
    `step_s` and `trained_tokens_per_s` and no TTFT; sharded, these are one GPU's, and among hosts
    there are none. Each
    `…_interval_s` holds nine in ten, judged by the fits' errors on ops that they never saw. `basis`
    says what the times come from and `confidence` whether most of the time lies within what was
    measured ("interpolated"), beyond it or by another GPU's ("extrapolated"), or by stated defaults
    ("uncalibrated"). `bound_by` is what takes most of the time in prefill and decode: compute,
    memory, latency of small kernels, communication, or the host.

    Passes are over lengths that their process has met before. At a length that is new to it, a
    prompt's or a cache's that grows, a pass takes `new_length_s` longer (attention_plans.py; None
    where nobody timed it).
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    output_tokens_per_s: float | None = None
    step_s: float | None = None
    trained_tokens_per_s: float | None = None
    basis: str = UNCALIBRATED
    end_to_end_s: float | None = None
    ttft_interval_s: Interval | None = None
    tpot_interval_s: Interval | None = None
    step_interval_s: Interval | None = None
    confidence: str = "uncalibrated"
    prefill_bound_by: str = ""
    decode_bound_by: str = ""
    new_length_s: float | None = None
    mfu: float | None = None
    mbu: float | None = None
    energy_j: float | None = None


@lru_cache(maxsize=256)
def latency(
    model: Model, work: Inference, setting: Setting, runtime: str, gpu: Gpu, stamp: Stamp = None
) -> Latency:
    """The times of one workload, remembered as long as the device's calibration has its `stamp`."""
    return times(model, work, setting, runtime, gpu)


def times(model: Model, work: Inference, setting: Setting, runtime: str, gpu: Gpu) -> Latency:
    """One prefill of the prompt, then output_tokens − 1 steps, each over one token more.

    The sizes of `work` may be arrays of one shape; so are the times then.
    """
    rules = runtime_named(runtime)
    passes = passes_of(model, setting, runtime, gpu, padded=work.padded)
    encoder = model.encoder_length(work.encoder_tokens, work.prompt_tokens)
    held = clock_capacity(setting, work)
    prompt = Dims(
        batch=work.batch,
        tokens=work.prompt_tokens,
        context=work.prompt_tokens,
        capacity=held,
        encoder=encoder,
        routing=work.routing,
    )
    several, chunk = (
        prompt_passes(prompt, setting.max_batched_tokens) if rules.pooled else (1, prompt)
    )
    first = passes.timed(lambda stage: rules.prefill(stage, work, setting), chunk).repeated(several)
    steps = work.output_tokens - 1
    tpot_s = step = None
    dims = chunk
    if steps:
        contexts = np.linspace(
            work.prompt_tokens + 1, work.context_tokens, min(steps, MAX_DECODE_POINTS), axis=-1
        )
        batch = np.asarray(work.batch, dtype=np.float64)[..., None]
        read = np.asarray(encoder, dtype=np.float64)[..., None]
        room = None if held is None else np.asarray(held, dtype=np.float64)[..., None]
        dims = Dims(
            batch=batch,
            tokens=1.0,
            context=contexts,
            capacity=room,
            encoder=read,
            routing=work.routing,
        )
        step = passes.timed(lambda stage: rules.decode(stage, work, setting), dims)
        tpot_s = _mean(step.time_s, contexts)
    total_s = first.time_s + steps * (0.0 if tpot_s is None else tpot_s)
    basis = basis_of(passes.speed)
    speed_s = work.batch * work.output_tokens / total_s
    if np.ndim(total_s):
        return Latency(
            ttft_s=first.time_s,
            tpot_s=tpot_s,
            output_tokens_per_s=speed_s,
            end_to_end_s=total_s,
            basis=basis,
        )
    make = rules.decode if steps else rules.prefill
    new_length_s = passes.new_length_s(lambda stage: make(stage, work, setting), dims)
    told = _told(passes, first, step, float(total_s), steps, work, basis)
    return replace(told, new_length_s=new_length_s)


def _told(
    passes: Passes,
    first: PassTime,
    step: PassTime | None,
    total_s: float,
    steps: int,
    work: Inference,
    basis: str,
) -> Latency:
    """All that can be said of a single point."""
    mean: dict[str, Any] = {}
    if step is not None:
        for name in ("time_s", "error_s", "flops", "moved_bytes", "energy_j", "extrapolated_s"):
            value = getattr(step, name)
            mean[name] = None if value is None else float(np.mean(value))
    gpu, n = passes.speed.gpu, passes.setting.tensor_parallel
    flops = float(first.flops) + steps * mean.get("flops", 0.0)
    moved = float(first.moved_bytes) + steps * mean.get("moved_bytes", 0.0)
    joules = None
    if first.energy_j is not None:
        joules = n * (float(first.energy_j) + steps * (mean.get("energy_j") or 0.0))
    unsure = float(first.extrapolated_s) + steps * mean.get("extrapolated_s", 0.0)
    stages = passes.setting.pipeline_parallel
    return Latency(
        ttft_s=float(first.time_s),
        tpot_s=mean.get("time_s"),
        output_tokens_per_s=work.batch * work.output_tokens / total_s,
        end_to_end_s=total_s,
        basis=basis,
        ttft_interval_s=_interval(float(first.time_s), float(first.error_s)),
        tpot_interval_s=None if step is None else _interval(mean["time_s"], mean["error_s"]),
        confidence=_confidence(passes.speed.calibration, unsure, total_s),
        prefill_bound_by=bound_by(first, passes.speed),
        decode_bound_by="" if step is None else bound_by(step, passes.speed),
        mfu=flops / (total_s * stages * gpu.flops_per_s(passes.speed.product_dtype)),
        mbu=moved / (total_s * stages * gpu.memory_bandwidth_bytes_per_s),
        energy_j=joules,
    )


def _mean(step_s: Number, contexts: Number) -> Number:
    return np.mean(np.broadcast_to(step_s, np.shape(contexts)), axis=-1)


def _interval(time_s: float, error_s: float) -> Interval:
    return max(0.0, time_s - error_s), time_s + error_s


def bound_by(made: PassTime, speed: Speed) -> str:
    """What takes most of a pass."""
    gpu, host = float(np.mean(made.gpu_s)), made.host_s
    said = float(np.mean(made.communication_s))
    if host > gpu + said:
        return "host"
    if said > gpu:
        return "communication"
    compute = float(np.mean(made.flops)) / speed.gpu.flops_per_s(speed.product_dtype)
    memory = float(np.mean(made.moved_bytes)) / speed.gpu.memory_bandwidth_bytes_per_s
    if max(compute, memory) < 0.4 * gpu:
        return "latency"
    return "compute" if compute > memory else "memory"


def basis_of(speed: Speed) -> str:
    """What the times come from, in words."""
    calibration = speed.calibration
    if calibration is None:
        return f"{UNCALIBRATED}{speed.uncalibrated_because}"
    if calibration.transferred_from is not None:
        return f"ops measured on {calibration.transferred_from}, by the ratio of ceilings"
    if speed.gpu.is_cpu:
        return _basis_on_cpu(calibration)
    where = f" ({calibration.own_file})" if calibration.own_file else ""
    return f"ops measured on {calibration.gpu}{where}"


def _basis_on_cpu(calibration: Calibration) -> str:
    timed, asked = calibration.measured_on, calibration.used_on
    told = "an unnamed CPU" if timed is None else timed.in_words
    if calibration.is_elsewhere and asked is not None:
        return f"ops measured on {told}, not on {asked.in_words}"
    return f"ops measured {'here' if calibration.own_file else f'on {told}'}"


def _confidence(calibration: Calibration | None, unsure_s: float, total_s: float) -> str:
    if calibration is None:
        return "uncalibrated"
    other = calibration.transferred_from is not None or calibration.is_elsewhere
    far = other or unsure_s > 0.25 * total_s
    return "extrapolated" if far else "interpolated"


MEASURED_IN = ("transformers", "attnlab")
"""Runtimes whose steps were held against a GPU's: times in others have no interval."""
UNTIMED_OPTIMIZERS = ("adamw-8bit", "adafactor-transformers")
"""Those whose kernels nobody timed: bitsandbytes' takes far longer than its bytes would, and
transformers' Adafactor was never run on a GPU."""


@lru_cache(maxsize=256)
def training_latency(
    model: Model,
    work: Training,
    deploy: Deployment,
    setting: Setting,
    gpu: Gpu,
    stamp: Stamp = None,
) -> Latency:
    """One step: forward, backward and optimizer; sharded among the GPUs of one host at most.

    Of several batches whose gradients add up each has its forward and backward.
    """
    if setting.sharding is not None and setting.sharding.shards > max(MEASURED):
        return Latency(basis=UNTIMED)
    phase = training_phase(model, work, deploy, setting)
    passes = replace(
        passes_of(model, setting, deploy.runtime, gpu),
        selective=work.checkpointing == "selective",
    )
    made = passes.timed(lambda _: phase.program, phase.dims)
    if work.accumulation_steps > 1:
        first = training_phase(model, replace(work, accumulation_steps=1), deploy, setting)
        made = _accumulated(made, passes, phase, first, work.accumulation_steps)
    step_s = float(made.time_s)
    tokens = work.batch * work.sequence_tokens * work.accumulation_steps
    calibration = passes.speed.calibration
    unmeasured = (
        setting.sharding is not None
        or work.optimizer in UNTIMED_OPTIMIZERS
        or deploy.runtime not in MEASURED_IN
    )
    return Latency(
        step_s=step_s,
        trained_tokens_per_s=tokens / step_s,
        basis=basis_of(passes.speed),
        step_interval_s=None if unmeasured else _interval(step_s, float(made.error_s)),
        confidence=_confidence(calibration, float(made.extrapolated_s), step_s),
        prefill_bound_by=bound_by(made, passes.speed),
        mfu=float(made.flops) / (step_s * gpu.flops_per_s(passes.speed.product_dtype)),
        mbu=float(made.moved_bytes) / (step_s * gpu.memory_bandwidth_bytes_per_s),
        energy_j=None if made.energy_j is None else float(made.energy_j),
    )


def _accumulated(
    made: PassTime, passes: Passes, phase: Phase, first: Phase, batches: int
) -> PassTime:
    """The program that was made is of the last batch and the optimizer; without it, of each batch
    before, but for the first, whose gradients are added to none.
    """
    if batches > 2:
        made = made.after(_without_optimizer(passes, phase).repeated(batches - 2))
    return made.after(_without_optimizer(passes, first))


def _without_optimizer(passes: Passes, phase: Phase) -> PassTime:
    segments = tuple(s for s in phase.program.segments if s.phase != OPTIMIZER_STEP)
    alone = Program(name=phase.program.name, segments=segments)
    return passes.timed(lambda _: alone, phase.dims)
