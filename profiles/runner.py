"""Measure a model: memory in a pass of its own, time in others, one record for each phase.

A meter that watches every op slows the ops down, and a peak says nothing about the passes between
two clock readings; so no pass serves both. Each record is on disk before the next phase begins.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

import planner
from planner import ConfigError, Model
from planner.errors import check_choice, check_size
from planner.format import gib
from profiles import environment, meters, nvml, records
from profiles.records import DEFAULT_OUT, PHASES, Record
from profiles.workloads import RUNTIMES, TORCH_DTYPES, Logits, Workload, attention_name, build

T = TypeVar("T")

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what comes next)."""

ENERGY_WINDOW_S = 1.0
"""Shorter windows hold too few steps of the energy counter (20–100 ms each)."""

WARMUP_TOKENS = 3
"""A warm-up pass of a generation ends after this many tokens: a prefill and two decode steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One phase to measure: what is run, and how often."""

    phase: Literal["prefill", "decode", "generation"]
    batch: int
    prompt_tokens: int
    output_tokens: int
    logits: Logits
    repeats: int
    warmup: int

    @property
    def context_tokens(self) -> int:
        """KV length at the end: the last token is put out and never cached."""
        return self.prompt_tokens + self.output_tokens - 1

    @property
    def passes(self) -> int:
        """Timed passes. A decode pass has many steps: as many passes as `repeats` steps need."""
        if self.phase == "decode":
            return math.ceil(self.repeats / (self.output_tokens - 1))
        return self.repeats


def profile(
    model: Model,
    *,
    batch: int,
    prompt_tokens: int,
    output_tokens: int,
    device: str = "auto",
    runtime: str = "attnlab",
    attention: str | None = None,
    dtype: str | None = None,
    phases: Iterable[str] = PHASES,
    repeats: int = 5,
    warmup: int = 2,
    out: Path | str = DEFAULT_OUT,
    on_progress: Progress | None = None,
    logits: Logits = "last",
    suite: str | None = None,
    split: Literal["calibration", "held-out"] | None = None,
) -> list[Record]:
    """Build the model with random weights, measure each phase, append a record for each to `out`.

    `prefill` is measured as output_tokens = 1, `decode` times the output_tokens − 1 steps after an
    untimed prefill, `generation` times both. With output_tokens = 1 nothing is decoded: that phase
    is left out. An error or a lack of memory on the way becomes a record with that status. Raises
    ConfigError, before anything is built, for arguments that cannot be right and for work that by
    our own estimate needs more memory than is free.
    """
    points = _points(phases, batch, prompt_tokens, output_tokens, logits, repeats, warmup)
    check_choice("runtime", runtime, RUNTIMES)
    if split is not None:
        check_choice("split", split, ("calibration", "held-out"))
    dtype = check_choice("dtype", dtype or model.dtype, TORCH_DTYPES)
    target = environment.find_device(device)
    before = _used_before_bytes() if target.type == "cuda" else {}
    uuid = environment.device_uuid(target)
    report = on_progress or (lambda done, total, what: None)
    with nvml.open_device(uuid) if uuid else nullcontext() as driver:
        env = environment.describe(target, driver)
        deploy = planner.Deployment(
            gpu=env.gpu or "cpu",
            runtime=runtime,
            attention=attention,
            dtype=dtype,
            kv_dtype=dtype,
            mode="eager",
        )
        _refuse_what_does_not_fit(model, points, deploy, env.gpu, environment.free_bytes(target))
        records.check_writable(out)
        report(0, 1 + len(points), f"build {model.name}")
        workload, status = _attempt(
            lambda: build(model, runtime=runtime, attention=attention, dtype=dtype, device=target)
        )
        bench = _Bench(target, driver, before.get(uuid) if uuid else None)
        done: list[Record] = []
        for index, point in enumerate(points, start=1):
            report(index, 1 + len(points), point.phase)
            values: dict[str, Any] = {"attention": attention}
            if workload is not None:
                status = bench.measure(workload, point, values)
            clocks = values.pop("clocks", {})
            record = records.create(
                suite=suite,
                split=split,
                status=status,
                model=model.name,
                config=model.config,
                runtime=runtime,
                runtime_version=environment.installed(RUNTIMES[runtime].distribution),
                phase=point.phase,
                batch=batch,
                prompt_tokens=prompt_tokens,
                output_tokens=point.output_tokens,
                context_tokens=None if point.phase == "prefill" else point.context_tokens,
                dtype=dtype,
                kv_dtype=dtype,
                logits=logits,
                mode="eager",
                environment=replace(env, **clocks),
                **values,
            )
            records.append(out, record)
            done.append(record)
        report(1 + len(points), 1 + len(points), "done")
    return done


class _Bench:
    """The device that is measured on."""

    def __init__(
        self, device: torch.device, driver: nvml.NvmlDevice | None, before_bytes: int | None
    ) -> None:
        self.device, self.driver, self.before_bytes = device, driver, before_bytes

    def measure(self, workload: Workload, point: Point, values: dict[str, Any]) -> str:
        """Memory, then time, added to `values` as far as they came; how it ended."""
        for measurement in (self.memory, self.time):
            found, status = _attempt(partial(measurement, workload, point))
            values |= found or {}
            workload.end()
            if self._cuda:
                torch.cuda.empty_cache()
            if status != "ok":
                break
        return status

    def memory(self, workload: Workload, point: Point) -> dict[str, Any]:
        """Live tensors in one pass under the meter; on CUDA, torch's and NVML's in another."""
        ids = self._prompt(workload, point)
        gc.collect()
        passes: list[set[str]] = []
        with torch.no_grad(), meters.LiveTensorMeter(device=self.device) as meter:
            workload.begin(batch=point.batch, capacity_tokens=point.context_tokens)
            for _ in self._tokens(workload, point, ids):
                passes.append(meter.take_ops())
            kv_cache_bytes = workload.kv_cache_bytes()
        workload.end()
        seen = passes[1:] if point.phase == "decode" else passes
        values: dict[str, Any] = {
            "weights_bytes": workload.weights_bytes,
            "kv_cache_bytes": kv_cache_bytes,
            "attention": attention_name(workload.attention, seen),
        }
        if point.phase == "decode":
            return values
        values["peak_live_bytes"] = workload.weights_bytes + meter.peak_bytes
        values["peak_op"] = meter.peak_op
        return values | (self._cuda_memory(workload, point, ids) if self._cuda else {})

    def time(self, workload: Workload, point: Point) -> dict[str, Any]:
        """Every timed step, and the energy of them together."""
        ids = self._prompt(workload, point)
        first, rest = meters.Stopwatch(device=self.device), meters.Stopwatch(device=self.device)
        workload.begin(batch=point.batch, capacity_tokens=point.context_tokens)
        warmup = replace(point, output_tokens=min(point.output_tokens, WARMUP_TOKENS))
        for _ in range(point.warmup):
            self._timed_pass(workload, warmup, ids, first, rest)
        first.samples_s.clear()
        rest.samples_s.clear()
        gc.collect()
        started_j, started_s = self._energy_j(), time.perf_counter()
        for _ in range(point.passes):
            self._timed_pass(workload, point, ids, first, rest)
        ended_j, ended_s = self._energy_j(), time.perf_counter()
        values = self._clocks()
        if started_j is not None and ended_j is not None and ended_s - started_s >= ENERGY_WINDOW_S:
            values["energy_j"] = ended_j - started_j
        steps = first if point.phase == "prefill" else rest
        values["step_s"] = tuple(steps.samples_s)
        values["ttft_s"] = tuple(first.samples_s) if point.phase == "generation" else ()
        values["warmup_steps"] = point.warmup
        return values

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    def _prompt(self, workload: Workload, point: Point) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (point.batch, point.prompt_tokens)
        return torch.randint(workload.vocab_size, shape, generator=generator).to(self.device)

    def _tokens(
        self, workload: Workload, point: Point, ids: torch.Tensor
    ) -> Iterable[torch.Tensor]:
        return workload.tokens(ids, output_tokens=point.output_tokens, logits=point.logits)

    def _timed_pass(
        self,
        workload: Workload,
        point: Point,
        ids: torch.Tensor,
        first: meters.Stopwatch,
        rest: meters.Stopwatch,
    ) -> None:
        workload.reset()
        tokens = iter(self._tokens(workload, point, ids))
        with first.step():
            next(tokens)
        for _ in range(point.output_tokens - 1):
            with rest.step():
                next(tokens)

    def _cuda_memory(self, workload: Workload, point: Point, ids: torch.Tensor) -> dict[str, Any]:
        """Peaks of an unmetered pass; the metered one before it has loaded the kernels."""
        meters.reset_cuda_peaks(self.device)
        workload.begin(batch=point.batch, capacity_tokens=point.context_tokens)
        for _ in self._tokens(workload, point, ids):
            pass
        peaks = meters.cuda_peaks(self.device)
        at_peak = self.driver.memory_used_bytes() if self.driver else None
        workload.end()
        torch.cuda.empty_cache()
        return {
            "peak_allocated_bytes": peaks.allocated_bytes,
            "peak_reserved_bytes": peaks.reserved_bytes,
            "peak_requested_bytes": peaks.requested_bytes,
            "device_used_before_bytes": self.before_bytes,
            "device_used_peak_bytes": at_peak,
            "device_used_after_bytes": self.driver.memory_used_bytes() if self.driver else None,
            "device_reserve_bytes": self.driver.reserve_bytes() if self.driver else None,
        }

    def _energy_j(self) -> float | None:
        return self.driver.energy_j() if self.driver else None

    def _clocks(self) -> dict[str, Any]:
        """Clocks and throttling right behind the last timed pass."""
        if self.driver is None:
            return {}
        clocks = self.driver.clocks()
        return {
            "throttle_reasons": self.driver.throttle_reasons(),
            "clocks": {"sm_clock_hz": clocks.sm_hz, "memory_clock_hz": clocks.memory_hz},
        }


def _points(
    phases: Iterable[str],
    batch: int,
    prompt_tokens: int,
    output_tokens: int,
    logits: Logits,
    repeats: int,
    warmup: int,
) -> list[Point]:
    for name, value in {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "repeats": repeats,
    }.items():
        check_size(name, value)
    check_size("warmup", warmup, minimum=0)
    check_choice("logits", logits, ("last", "all"))
    asked = [check_choice("phases", phase, PHASES) for phase in phases]
    if output_tokens == 1:
        asked = [phase for phase in asked if phase != "decode"]
    if not asked:
        raise ConfigError("phases has nothing to measure: decode needs output_tokens of 2 or more")
    return [
        Point(
            phase=phase,  # type: ignore[arg-type]
            batch=batch,
            prompt_tokens=prompt_tokens,
            output_tokens=1 if phase == "prefill" else output_tokens,
            logits=logits,
            repeats=repeats,
            warmup=warmup,
        )
        for phase in asked
    ]


def _refuse_what_does_not_fit(
    model: Model,
    points: Sequence[Point],
    deploy: planner.Deployment,
    gpu: str | None,
    free_bytes: int,
) -> None:
    """ConfigError when our own estimate of the largest point is more than what is free now.

    What is free already lacks this process's CUDA context, so that is not asked for again. Of a GPU
    outside the catalogue only the live tensors are known.
    """
    largest = max(points, key=lambda point: point.output_tokens)
    estimate = planner.estimate(
        model,
        planner.Inference(
            batch=largest.batch,
            prompt_tokens=largest.prompt_tokens,
            output_tokens=largest.output_tokens,
            logits=largest.logits,
        ),
        deploy,
    )
    memory = estimate.memory
    needed_bytes = memory.peak_live_bytes if gpu is None else memory.peak_allocated_bytes
    if needed_bytes > free_bytes or (gpu is not None and not estimate.fits):
        raise ConfigError(
            f"{model.name} with batch={largest.batch}, {largest.context_tokens} tokens in "
            f"{deploy.dtype} needs {gib(needed_bytes)}, {gib(free_bytes)} available"
        )


def _attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """The result and "ok", or None and what went wrong; bad input and interrupts go through."""
    try:
        return action(), "ok"
    except ConfigError:
        raise
    except Exception as error:
        status = _status(error)
    gc.collect()  # the traceback held the pass's tensors until here
    return None, status


def _status(error: Exception) -> str:
    message = (str(error).strip().splitlines() or [""])[0][:300]
    no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if no_memory or "not enough memory" in message or "can't allocate memory" in message:
        return "oom"
    return f"error: {type(error).__name__}: {message}"


@cache
def _used_before_bytes() -> dict[str, int]:
    """Used on each device before this process touched one; empty when it already has."""
    touched = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {} if touched else nvml.used_bytes_by_uuid()
