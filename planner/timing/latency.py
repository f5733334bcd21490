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

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from planner.catalog.gpus import Gpu
from planner.model import Model
from planner.program import Dims, Number, Program
from planner.runtimes import runtime_named
from planner.runtimes.base import Setting
from planner.timing.calibration import Calibration
from planner.timing.calibration_files import Stamp
from planner.timing.collectives import MEASURED, Lanes, lanes_of
from planner.timing.energy import pass_joules
from planner.timing.fresh_pages import PAGES_ERROR, given_seconds
from planner.timing.host_cost import (
    ENGINES,
    Engine,
    between_seconds,
    forward_runs,
    head_seconds,
    host_seconds,
)
from planner.timing.op_kinds import kernel_count
from planner.timing.power import capped_clock
from planner.timing.roofline import UNTIMED_ERROR, Cost, Speed, pass_cost
from planner.timing.speed import communication_cost, speed_for
from planner.training import training_phase
from planner.workload import Deployment, Inference, Training

MAX_DECODE_POINTS = 16
"""Contexts at which a decode step is timed for the mean; all of them when there are fewer."""

BACKWARD = "backward"
UNCALIBRATED = "uncalibrated roofline"
UNTIMED = f"not planned: more than {max(MEASURED)} shards cross hosts, by a network unknown here"
"""Of sharded training."""
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Times of a workload. TPOT is the mean over the decode steps.

    `tpot_s` is None where there is no decode step (output_tokens = 1). A training step has
    `step_s` and `trained_tokens_per_s` and no TTFT; sharded among hosts it has no times. Each
    `…_interval_s` holds nine in ten, judged by the fits' errors on ops that they never saw. `basis`
    says what the times come from and `confidence` whether most of the time lies within what was
    measured ("interpolated"), beyond it or by another GPU's ("extrapolated"), or by stated defaults
    ("uncalibrated"). `bound_by` is what takes most of the time in prefill and decode: compute,
    memory, latency of small kernels, communication, or the host.
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
    mfu: float | None = None
    mbu: float | None = None
    energy_j: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTime:
    """One pass through all stages: its time, how far it may be off, what binds it.

    `clock`: the share of a burst's that its GPU runs at (power.py).
    """

    time_s: Number
    error_s: Number
    gpu_s: Number
    host_s: float
    communication_s: Number
    extrapolated_s: Number
    flops: Number
    moved_bytes: Number
    energy_j: Number | None
    clock: Number = 1.0

    def repeated(self, count: Number) -> PassTime:
        """So many of them, one after the other."""
        together: dict[str, Any] = {}
        for field in fields(self):
            once = getattr(self, field.name)
            alike = once is None or field.name == "clock"
            together[field.name] = once if alike else count * once
        return PassTime(**together)


def prompt_passes(prompt: Dims, most_tokens: int) -> tuple[Number, Dims]:
    """In how many passes the prompts are taken, and the mean one of them."""
    batch, length = (np.asarray(size, dtype=np.float64) for size in (prompt.batch, prompt.tokens))
    several = np.ceil(batch * length / most_tokens)
    whole = length <= most_tokens
    tokens = np.where(whole, length, batch * length / several)
    return several, replace(
        prompt,
        batch=np.where(whole, batch / several, 1.0)[()],
        tokens=tokens[()],
        context=np.where(whole, length, (length + tokens) / 2.0)[()],
    )


@lru_cache(maxsize=256)
def latency(
    model: Model, work: Inference, setting: Setting, runtime: str, gpu: Gpu, stamp: Stamp = None
) -> Latency:
    """The times of one workload, remembered as long as the device's calibration has its `stamp`."""
    return times(model, work, setting, runtime, gpu)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A phase of a stage: its kernels, what the host needs to issue them, collectives beside."""

    cost: Cost
    issuing_s: float
    lanes: Lanes | None = None

    @property
    def communication_s(self) -> float:
        """All of its collectives."""
        return 0.0 if self.lanes is None else self.lanes.communication_s

    def seconds(self, clock: Number) -> Number:
        """Until kernels and collectives are done."""
        return self.cost.seconds(clock) if self.lanes is None else self.lanes.seconds(clock)


@dataclass(frozen=True, slots=True)
class Passes:
    """A deployment's passes: the stages, and how fast their device is."""

    model: Model
    stages: tuple[Model, ...]
    setting: Setting
    runtime: str
    speed: Speed

    def timed(self, program: Callable[[Model], Program], dims: Dims) -> PassTime:
        """A pass through the stages, one after the other."""
        setting, speed = self.setting, self.speed
        parts: list[Part] = []
        head_s = 0.0
        given_s: Number = 0.0
        for stage in self.stages:
            whole = program(stage)
            given_s = given_s + self._given(whole, dims)
            phases = by_phase(whole)
            again = layers_run_again(phases)
            parts += [self._made(phase, dims, again) for phase in phases]
            head_s = head_s or self._head(phases[0])
        pooled = runtime_named(self.runtime).pooled
        said = communication_cost(self.model, setting, dims, speed, gathers_logits=pooled)
        known, host = speed.calibration, sum(part.issuing_s for part in parts)
        replay_s = self._replay(tuple(program(stage) for stage in self.stages))

        def seconds(clock: Number) -> Number:
            first, *others = parts
            begun = self._part(first, clock, head_s)
            rest = sum(self._part(p, clock) for p in others)
            return said.time_s + replay_s + given_s + begun + rest

        costs = [part.cost for part in parts]
        computed, moved = _sum(costs, "computed_flops"), _sum(costs, "moved_bytes")
        clock = capped_clock(
            seconds,
            computed,
            moved,
            None if known is None else known.energy,
            setting.power_limit_w or speed.gpu.tdp_w,
            speed.product_dtype,
        )
        time_s = seconds(clock)
        gpu: Number = sum(cost.seconds(clock) for cost in costs)
        error = np.sqrt(sum(cost.error_s**2 for cost in costs) + said.error_s**2)
        waited = time_s - gpu - said.time_s - replay_s - given_s
        error = np.hypot(error, PAGES_ERROR * given_s)
        if host and known is not None and known.host is not None:
            error = np.where(waited > 0, np.hypot(error, host * known.host.spread), error)
        if known is None or (speed.gpu.is_cpu and known.is_elsewhere):
            error = np.maximum(error, UNTIMED_ERROR * time_s)  # all ops of it are off alike
        return PassTime(
            time_s=time_s,
            error_s=error,
            gpu_s=gpu,
            host_s=host,
            communication_s=said.time_s + sum(part.communication_s for part in parts),
            extrapolated_s=_sum(costs, "extrapolated_s"),
            flops=_sum(costs, "flops"),
            moved_bytes=moved,
            energy_j=pass_joules(
                computed,
                moved,
                time_s,
                speed.gpu,
                dtype=speed.product_dtype,
                calibration=known,
                clock=clock,
            ),
            clock=clock,
        )

    def _made(self, phase: Program, dims: Dims, again: int) -> Part:
        """One phase of a stage; of sharded training with its collectives."""
        lanes, sharding = None, self.setting.sharding
        if sharding is not None:
            backward = phase.segments[0].phase == BACKWARD
            lanes = lanes_of(phase, dims, self.speed, sharding.shards, backward=backward)
        return Part(
            cost=pass_cost(phase, dims, self.speed),
            issuing_s=self._host(phase, again),
            lanes=lanes,
        )

    def _part(self, part: Part, clock: Number, head_s: float = 0.0) -> Number:
        """A phase of a stage: the longer of kernels and host, of a CPU both.

        Kernels of the first phase wait for the host's `head_s`.
        """
        kernels_s = part.seconds(clock)
        if self.speed.gpu.is_cpu:
            return kernels_s + part.issuing_s
        return np.maximum(head_s + kernels_s, part.issuing_s)

    def _given(self, program: Program, dims: Dims) -> Number:
        """What a CPU's system takes to give a pass pages that it has not had."""
        known = self.speed.calibration
        return 0.0 if known is None else given_seconds(program, dims, known)

    def _head(self, program: Program) -> float:
        """What an idle GPU waits for at the start of a pass."""
        known = self.speed.calibration
        if self.replays or self.speed.gpu.is_cpu or known is None or known.host is None:
            return 0.0
        return head_seconds(program, known.host.as_fast_as(self.setting.host_add_s), self.engine)

    def _replay(self, programs: tuple[Program, ...]) -> float:
        """What a CUDA graph takes beside its kernels' own times: a floor, and of torch's kernels,
        where none is fused with the next, a gap each.
        """
        known = self.speed.calibration
        if not self.replays or known is None or known.graph is None:
            return 0.0
        if self.runtime not in ENGINES or self.speed.fused:
            return known.graph.replay_s
        kernels = sum(kernel_count(made) for made in programs)
        return known.graph.replay_s + kernels * known.graph.between_s

    @property
    def replays(self) -> bool:
        """Whether a CUDA graph launches the kernels."""
        return self.setting.mode != "eager" and not self.speed.gpu.is_cpu

    def _host(self, program: Program, checkpointed: int) -> float:
        """What the host needs to issue a pass; of a CPU, whose op times hold that, what lies
        between the ops; 0 where a graph replays.
        """
        known = self.speed.calibration
        if self.replays or known is None or known.host is None:
            return 0.0
        seconds = between_seconds if self.speed.gpu.is_cpu else host_seconds
        host = known.host.as_fast_as(self.setting.host_add_s)
        return seconds(program, host, self.engine, checkpointed=checkpointed)

    @property
    def engine(self) -> Engine:
        """Whose code issues the ops."""
        return Engine(
            runtime=self.runtime,
            model_type=self.model.text_type,
            attention=self.setting.attention,
        )


def _sum(costs: list[Cost], name: str) -> Number:
    return sum(getattr(cost, name) for cost in costs)


def layers_run_again(phases: tuple[Program, ...]) -> int:
    """Checkpointed layers: those that run forward on the way back."""
    return sum(
        forward_runs(program).layers for program in phases if program.segments[0].phase == BACKWARD
    )


@lru_cache(maxsize=256)
def by_phase(program: Program) -> tuple[Program, ...]:
    """Forward, backward and optimizer apart, where a program has them.

    A host that is ahead in one has used it up before the next: only some 1 000 kernels wait for a
    GPU at a time.
    """
    phases = dict.fromkeys(segment.phase for segment in program.segments)
    if len(phases) == 1:
        return (program,)
    return tuple(
        Program(name=program.name, segments=tuple(s for s in program.segments if s.phase == phase))
        for phase in phases
    )


def passes_of(model: Model, setting: Setting, runtime: str, gpu: Gpu) -> Passes:
    """What runs one after the other."""
    rules = runtime_named(runtime)
    shares = rules.shares(model, setting.tensor_parallel, setting.pipeline_parallel)
    return Passes(
        model=model,
        stages=tuple(share.model for share in shares),
        setting=setting,
        runtime=runtime,
        speed=speed_for(model, setting, runtime, gpu),
    )


def times(model: Model, work: Inference, setting: Setting, runtime: str, gpu: Gpu) -> Latency:
    """One prefill of the prompt, then output_tokens − 1 steps, each over one token more.

    The sizes of `work` may be arrays of one shape; so are the times then.
    """
    rules = runtime_named(runtime)
    passes = passes_of(model, setting, runtime, gpu)
    encoder = model.encoder_length(work.encoder_tokens, work.prompt_tokens)
    prompt = Dims(
        batch=work.batch,
        tokens=work.prompt_tokens,
        context=work.prompt_tokens,
        encoder=encoder,
        routing=work.routing,
    )
    several, chunk = (
        prompt_passes(prompt, setting.max_batched_tokens) if rules.pooled else (1, prompt)
    )
    first = passes.timed(lambda stage: rules.prefill(stage, work, setting), chunk).repeated(several)
    steps = work.output_tokens - 1
    tpot_s = step = None
    if steps:
        contexts = np.linspace(
            work.prompt_tokens + 1, work.context_tokens, min(steps, MAX_DECODE_POINTS), axis=-1
        )
        batch = np.asarray(work.batch, dtype=np.float64)[..., None]
        read = np.asarray(encoder, dtype=np.float64)[..., None]
        dims = Dims(batch=batch, tokens=1.0, context=contexts, encoder=read, routing=work.routing)
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
    return _told(passes, first, step, float(total_s), steps, work, basis)


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


@lru_cache(maxsize=256)
def training_latency(
    model: Model,
    work: Training,
    deploy: Deployment,
    setting: Setting,
    gpu: Gpu,
    stamp: Stamp = None,
) -> Latency:
    """One step: forward, backward and optimizer; sharded among the GPUs of one host at most."""
    if setting.sharding is not None and setting.sharding.shards > max(MEASURED):
        return Latency(basis=UNTIMED)
    phase = training_phase(model, work, deploy, setting)
    passes = passes_of(model, setting, deploy.runtime, gpu)
    made = passes.timed(lambda _: phase.program, phase.dims)
    step_s, tokens = float(made.time_s), work.batch * work.sequence_tokens
    calibration = passes.speed.calibration
    unmeasured = (
        model.quantization is not None
        or (work.adapters is not None and work.adapters.dora)
        or work.scales_loss(setting.dtype)
        or work.precision == "master"
        or work.freezes
        or setting.sharding is not None
        or work.loss_chunk_tokens is not None
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
