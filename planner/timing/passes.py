"""A pass of a deployment on the clock: its stages and phases, kernels, host and collectives.

A phase takes the longer of its kernels and of what the host needs to issue them; a CPU takes both,
one after the other. A pass that a CUDA graph replays waits for no host. Of two towers, an encoder
and a decoder, one may wait for the host and the other not: time that a GPU has lost in the first
does not come back in the second, while what it has yet to do then goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np

from planner.catalog.gpus import Gpu
from planner.model import Model
from planner.program import BACKWARD, ENCODED, OPTIMIZER_STEP, Dims, Number, Program
from planner.runtimes import runtime_named
from planner.runtimes.base import Setting
from planner.timing.attention_plans import new_length_seconds
from planner.timing.calibration import HostCost
from planner.timing.clock import UNTIMED_ERROR, Speed
from planner.timing.collectives import Lanes, lanes_of
from planner.timing.energy import pass_joules
from planner.timing.fresh_pages import PAGES_ERROR, given_seconds
from planner.timing.host_calls import cache_name
from planner.timing.host_cost import (
    ENGINES,
    Engine,
    between_seconds,
    forward_runs,
    head_seconds,
    host_seconds,
    unscaled_ops_seconds,
    waiting_seconds,
)
from planner.timing.op_kinds import kernel_count
from planner.timing.power import capped_clock
from planner.timing.roofline import Cost, pass_cost
from planner.timing.speed import communication_cost, speed_for


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

    def after(self, other: PassTime) -> PassTime:
        """Both, one after the other; they are off alike, and this one's clock is told."""
        together: dict[str, Any] = {}
        for field in fields(self):
            own, others = getattr(self, field.name), getattr(other, field.name)
            alone = own is None or field.name == "clock"
            together[field.name] = own if alone else own + others
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A phase of a stage: its kernels, what the host needs to issue them, collectives beside;
    `waiting_s`: what the kernels lose where the host waits for them. `towers`: where there are two,
    the kernels of each and which share of the issuing is theirs, in the order they run.
    """

    cost: Cost
    issuing_s: float
    lanes: Lanes | None = None
    waiting_s: float = 0.0
    towers: tuple[tuple[Cost, float], ...] = ()

    @property
    def communication_s(self) -> float:
        """All of its collectives."""
        return 0.0 if self.lanes is None else self.lanes.communication_s

    def seconds(self, clock: Number) -> Number:
        """Until kernels and collectives are done."""
        return self.cost.seconds(clock) if self.lanes is None else self.lanes.seconds(clock)


@dataclass(frozen=True, slots=True)
class Passes:
    """A deployment's passes: the stages, and how fast their device is; `padded` as of the work."""

    model: Model
    stages: tuple[Model, ...]
    setting: Setting
    runtime: str
    speed: Speed
    selective: bool = False
    padded: bool = False

    def timed(self, program: Callable[[Model], Program], dims: Dims) -> PassTime:
        """A pass through the stages, one after the other."""
        setting, speed = self.setting, self.speed
        parts: list[Part] = []
        head_s = 0.0
        given_s: Number = 0.0
        programs = tuple(program(stage) for stage in self.stages)
        for whole in programs:
            given_s = given_s + self._given(whole, dims)
            phases = by_phase(whole)
            again = layers_run_again(phases)
            parts += [self._made(phase, dims, again) for phase in phases]
            head_s = head_s or self._head(phases[0])
        pooled = runtime_named(self.runtime).pooled
        said = communication_cost(self.model, setting, dims, speed, gathers_logits=pooled)
        known, host = speed.calibration, sum(part.issuing_s for part in parts)
        replay_s = self._replay(programs)

        def seconds(clock: Number) -> Number:
            first, *others = parts
            begun = self._part(first, clock, head_s)
            rest = sum(self._part(p, clock) for p in others)
            return said.time_s + replay_s + given_s + begun + rest

        costs = [part.cost for part in parts]
        computed, moved = _sum(costs, "computed_flops"), _sum(costs, "moved_bytes")
        watts = setting.power_limit_w or speed.gpu.tdp_w
        clock = capped_clock(
            seconds,
            computed,
            moved,
            None if known is None else known.energy,
            watts,
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
                most_w=watts,
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
            issuing_s=self._issued(phase, again),
            lanes=lanes,
            waiting_s=self._waiting(phase),
            towers=self._towers(phase, dims),
        )

    def _part(self, part: Part, clock: Number, head_s: float = 0.0) -> Number:
        """A phase of a stage: the longer of kernels and host, of a CPU both.

        Kernels of the first phase wait for the host's `head_s`.
        """
        kernels_s = part.seconds(clock)
        if self.speed.gpu.is_cpu:
            return kernels_s + part.issuing_s
        if not part.towers:
            return np.maximum(head_s + kernels_s + part.waiting_s, part.issuing_s)
        done: Number = head_s + part.waiting_s
        issued = 0.0
        for cost, share in part.towers:
            issued += share * part.issuing_s
            done = np.maximum(done + cost.seconds(clock), issued)
        return done

    def _given(self, program: Program, dims: Dims) -> Number:
        """What a CPU's system takes to give a pass pages that it has not had."""
        known = self.speed.calibration
        return 0.0 if known is None else given_seconds(program, dims, known)

    def _head(self, program: Program) -> float:
        """What an idle GPU waits for at the start of a pass."""
        host = self._issuing
        return 0.0 if host is None else head_seconds(program, host, self.engine)

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

    def new_length_s(self, program: Callable[[Model], Program], dims: Dims) -> float | None:
        """What a pass takes longer at a length that its process meets for the first time; None
        where no host was timed.
        """
        host = self._host
        if host is None:
            return None
        made = program(self.stages[0])
        return new_length_seconds(made, dims, self.runtime, self.setting, self.speed, host)

    @property
    def replays(self) -> bool:
        """Whether a CUDA graph launches the kernels."""
        return self.setting.mode != "eager" and not self.speed.gpu.is_cpu

    @property
    def _host(self) -> HostCost | None:
        """What issuing ops costs at the speed that was told; None where nobody timed it."""
        known = self.speed.calibration
        if known is None or known.host is None:
            return None
        return known.host.as_fast_as(self.setting.host_add_s)

    @property
    def _issuing(self) -> HostCost | None:
        """The host that a GPU may wait for; None where a graph replays, and of a CPU."""
        return None if self.replays or self.speed.gpu.is_cpu else self._host

    def _issued(self, program: Program, checkpointed: int) -> float:
        """What the host needs to issue a pass; of a CPU, whose op times hold that, what lies
        between the ops; 0 where a graph replays.
        """
        host = None if self.replays else self._host
        if host is None:
            return 0.0
        seconds = between_seconds if self.speed.gpu.is_cpu else host_seconds
        return seconds(program, host, self.engine, checkpointed=checkpointed)

    def _towers(self, phase: Program, dims: Dims) -> tuple[tuple[Cost, float], ...]:
        """Encoder and decoder of a phase."""
        halves, host = by_tower(phase), self._host
        if len(halves) < 2 or self.speed.gpu.is_cpu or host is None:
            return ()
        issued = [unscaled_ops_seconds(half, host) for half in halves]
        return tuple(
            (pass_cost(half, dims, self.speed), one / sum(issued))
            for half, one in zip(halves, issued, strict=True)
        )

    def _waiting(self, program: Program) -> float:
        host = self._issuing
        return 0.0 if host is None else waiting_seconds(program, host, self.engine)

    @property
    def engine(self) -> Engine:
        """Whose code issues the ops."""
        setting = self.setting
        return Engine(
            runtime=self.runtime,
            model_type=self.model.text_type,
            attention=setting.attention,
            cache=cache_name(
                self.runtime,
                setting.cache,
                kv_dtype=setting.kv_dtype,
                dtype=setting.dtype,
                padded=self.padded,
            ),
            selective=self.selective,
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


@lru_cache(maxsize=256)
def by_tower(phase: Program) -> tuple[Program, ...]:
    """The parts of a phase before and behind the way from an encoder to a decoder, either way."""
    ends = [
        place for place, segment in enumerate(phase.segments) if segment.label.endswith(ENCODED)
    ]
    if not ends or phase.segments[0].phase == OPTIMIZER_STEP:
        return (phase,)
    turn = ends[0] + (phase.segments[0].phase != BACKWARD)
    halves = (phase.segments[:turn], phase.segments[turn:])
    return tuple(Program(name=phase.name, segments=half) for half in halves if half)


def passes_of(
    model: Model, setting: Setting, runtime: str, gpu: Gpu, *, padded: bool = False
) -> Passes:
    """What runs one after the other."""
    rules = runtime_named(runtime)
    shares = rules.shares(model, setting.tensor_parallel, setting.pipeline_parallel)
    return Passes(
        model=model,
        stages=tuple(share.model for share in shares),
        setting=setting,
        runtime=runtime,
        speed=speed_for(model, setting, runtime, gpu),
        padded=padded,
    )
