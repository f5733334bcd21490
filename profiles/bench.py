"""One point on one device: memory in passes of its own, time in others.

A meter that watches every op slows the ops down, and a peak says nothing about the passes between
two clock readings; so no pass serves both. On CUDA the first pass of all is the one whose peaks
torch and NVML tell: it is what a user's process does, its kernels not yet loaded.
"""

from __future__ import annotations

import gc
import os
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from planner import ConfigError
from profiles import graph_step, meters, nvml
from profiles.points import Point
from profiles.records import WARMUP_STEPS
from profiles.workloads import Workload, attention_name

T = TypeVar("T")

ENERGY_WINDOW_S = 1.0
"""Shorter windows hold too few steps of the energy counter (20–100 ms each)."""

WARMUP_TOKENS = WARMUP_STEPS + 1
"""A warm-up pass of a generation ends after this many tokens: a prefill and two decode steps."""

TRACEBACKS = "PLANNER_TRACEBACKS"
"""Set in the environment: what becomes a record's status is also printed where it happened."""

Mark = Callable[[str], None]
"""Called with what begins: the marks of a time series."""


class Bench:
    """The device that is measured on. `before_bytes`: NVML's figure before this process used it."""

    def __init__(
        self,
        device: torch.device,
        driver: nvml.NvmlDevice | None,
        before_bytes: int | None,
        *,
        mark: Mark = lambda what: None,
    ) -> None:
        self.device, self.driver, self.before_bytes = device, driver, before_bytes
        self.mark = mark

    @property
    def on_cuda(self) -> bool:
        """Whether torch's allocator and NVML have anything to say."""
        return self.device.type == "cuda"

    @property
    def device_name(self) -> str:
        """As torch names it."""
        return torch.cuda.get_device_name(self.device) if self.on_cuda else self.device.type

    def measure(
        self, workload: Workload, point: Point, values: dict[str, Any], *, times_only: bool = False
    ) -> str:
        """Memory, then time, added to `values` as far as they came; how it ended."""
        steps = [self.memory, self.time]
        if times_only:
            steps = [self.kernels, self.time]
        elif self.on_cuda:
            steps.insert(0, self.cuda_memory)
        for measurement in steps:
            found, status = attempt(partial(measurement, workload, point))
            values |= found or {}
            workload.end()
            if self.on_cuda:
                torch.cuda.empty_cache()
            if status != "ok":
                break
        return status

    def cuda_memory(self, workload: Workload, point: Point) -> dict[str, Any]:
        """Peaks of torch's allocator, and NVML's figures at the peak and quiet."""
        if point.phase == "decode":
            return {}
        ids = self.prompt(workload, point)
        with self.peaks() as seen:
            workload.begin(batch=point.batch, capacity_tokens=point.context_tokens)
            self.mark("prefill")
            for index, _ in enumerate(self._tokens(workload, point, ids)):
                if index == 0 and point.output_tokens > 1:
                    torch.cuda.synchronize(self.device)
                    self.mark("decode")
            seen.take()
            self.mark("end")
            workload.end()
        return seen.values

    def memory(self, workload: Workload, point: Point) -> dict[str, Any]:
        """Live tensors in one pass under the meter."""
        ids = self.prompt(workload, point)
        gc.collect()
        passes: list[set[str]] = []
        with torch.no_grad(), meters.LiveTensorMeter(device=self.device) as meter:
            workload.begin(batch=point.batch, capacity_tokens=point.context_tokens)
            for _ in self._tokens(workload, point, ids):
                passes.append(meter.take_ops())
            kv_cache_bytes = workload.kv_cache_bytes()
        seen = passes[1:] if point.phase == "decode" else passes
        values: dict[str, Any] = {
            "weights_bytes": workload.weights_bytes,
            "kv_cache_bytes": kv_cache_bytes,
            "attention": attention_name(workload.attention, seen),
            "experts": workload.experts,
        }
        if point.phase != "decode":
            values["peak_live_bytes"] = workload.weights_bytes + meter.peak_bytes
            values["peak_op"] = meter.peak_op
        return values

    def kernels(self, workload: Workload, point: Point) -> dict[str, Any]:
        """Which attention and experts ran, of `memory` over two tokens."""
        seen = self.memory(workload, replace(point, output_tokens=min(point.output_tokens, 2)))
        return {name: seen[name] for name in ("attention", "experts")}

    def time(self, workload: Workload, point: Point) -> dict[str, Any]:
        """Every timed step, and the energy of them together."""
        ids = self.prompt(workload, point)
        first, rest = meters.Stopwatch(device=self.device), meters.Stopwatch(device=self.device)
        workload.begin(batch=point.batch, capacity_tokens=point.context_tokens)
        warmup = replace(point, output_tokens=min(point.output_tokens, WARMUP_TOKENS))
        for _ in range(point.warmup):
            self._timed_pass(workload, warmup, ids, first, rest)
        first.clear()
        rest.clear()

        def passes() -> None:
            for _ in range(point.passes):
                if point.mode == "graph":
                    self._replayed_pass(workload, point, ids, rest)
                else:
                    self._timed_pass(workload, point, ids, first, rest)

        values = self.powered(passes)
        steps = first if point.phase == "prefill" else rest
        values["step_s"] = tuple(steps.samples_s)
        values["ttft_s"] = tuple(first.samples_s) if point.phase == "generation" else ()
        leading = () if point.phase == "decode" else tuple(first.host_add_s)
        values["host_add_s"] = (*leading, *rest.host_add_s)
        values["warmup_steps"] = point.warmup
        return values

    def peaks(self) -> CudaPeaks:
        """A context around one pass whose peaks are wanted."""
        return CudaPeaks(self)

    def powered(self, passes: Callable[[], None]) -> dict[str, Any]:
        """Run; the energy it took where that was long enough, clocks and throttling right after."""
        gc.collect()
        started_j, started_s = self._energy_j(), time.perf_counter()
        passes()
        ended_j, ended_s = self._energy_j(), time.perf_counter()
        values = self._clocks()
        if started_j is not None and ended_j is not None and ended_s - started_s >= ENERGY_WINDOW_S:
            values["energy_j"] = ended_j - started_j
        return values

    def prompt(self, workload: Workload, point: Point) -> torch.Tensor:
        """Random ids [batch, prompt_tokens]; where they are padded, the workload hides padding."""
        ids = random_ids(workload.vocab_size, point.batch, point.prompt_tokens).to(self.device)
        if point.padded:
            mask = left_padding(point.batch, point.prompt_tokens, point.context_tokens)
            workload.hide(mask.to(self.device))
        return ids

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

    def _replayed_pass(
        self, workload: Workload, point: Point, ids: torch.Tensor, rest: meters.Stopwatch
    ) -> None:
        """A prefill, then every decode step captured, replayed once unseen and once timed."""
        workload.reset()
        token = next(iter(workload.tokens(ids, output_tokens=1, logits=point.logits)))
        for _ in range(point.output_tokens - 1):
            step = graph_step.capture(workload, token, point.logits)
            step.replay()  # the first replay uploads the graph
            with rest.step():
                step.replay()
            token = step.token

    def _energy_j(self) -> float | None:
        return self.driver.energy_j() if self.driver else None

    def _clocks(self) -> dict[str, Any]:
        if self.driver is None:
            return {}
        clocks = self.driver.clocks()
        return {
            "throttle_reasons": self.driver.throttle_reasons(),
            "clocks": {"sm_clock_hz": clocks.sm_hz, "memory_clock_hz": clocks.memory_hz},
        }


class CudaPeaks:
    """What torch and NVML say of the block; `take` while its segments are still held."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.values: dict[str, Any] = {}

    def __enter__(self) -> CudaPeaks:
        gc.collect()
        meters.reset_cuda_peaks(self._bench.device)
        return self

    def take(self) -> None:
        """The peaks so far, and NVML's figure with every segment that was needed for them."""
        driver, peaks = self._bench.driver, meters.cuda_peaks(self._bench.device)
        self.values |= {
            "peak_allocated_bytes": peaks.allocated_bytes,
            "peak_reserved_bytes": peaks.reserved_bytes,
            "peak_requested_bytes": peaks.requested_bytes,
            "device_used_before_bytes": self._bench.before_bytes,
            "device_used_peak_bytes": driver.memory_used_bytes() if driver else None,
            "device_reserve_bytes": driver.reserve_bytes() if driver else None,
        }

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            torch.cuda.empty_cache()
            driver = self._bench.driver
            after = driver.memory_used_bytes() if driver else None
            self.values["device_used_after_bytes"] = after


def random_ids(vocab_size: int, batch: int, tokens: int) -> torch.Tensor:
    """Token ids [batch, tokens], the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (batch, tokens), generator=generator)


def left_padding(batch: int, prompt_tokens: int, context_tokens: int) -> torch.Tensor:
    """A mask [batch, context], int64: 0 on padding, before ever more of ever longer prompts.

    The first prompt has half of the tokens, the last all but 1 / 2 · batch of them: none is whole,
    for a mask without padding is none to transformers.
    """
    padding = prompt_tokens * torch.arange(batch, 0, -1) // (2 * batch)
    places = torch.arange(context_tokens)
    return (places >= padding.clamp(min=1)[:, None]).long()


def attempt(action: Callable[[], T]) -> tuple[T | None, str]:
    """The result and "ok", or None and what went wrong; bad input and interrupts go through."""
    try:
        return action(), "ok"
    except ConfigError:
        raise
    except Exception as error:
        if os.environ.get(TRACEBACKS):
            traceback.print_exc()
        status = status_of(error)
    gc.collect()  # the traceback held the pass's tensors until here
    return None, status


def status_of(error: Exception) -> str:
    """ "oom", or "error: …" with the first line of what went wrong."""
    message = (str(error).strip().splitlines() or [""])[0][:300]
    no_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if no_memory or "not enough memory" in message or "can't allocate memory" in message:
        return "oom"
    return f"error: {type(error).__name__}: {message}"
