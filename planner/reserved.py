"""What torch's allocator reserves for a workload: its passes, played through the simulator.

Weights first, in the order of the modules, then the prompt's ids, a preallocated cache, the prefill
and the decode steps of a greedy loop, launched one kernel at a time (a CUDA graph would keep a pool
of its own); in training two steps, of which the first makes the optimizer's states. Simulated, not
measured: which kernels allocate scratch of their own beyond the
programs and the cuBLAS workspace is not known here.

A decode step of a 32-layer model is about 3 000 events, and generations have thousands of them.
Steps are alike but for what grows with the context, and the small pool shares no segment with the
large one. So a pool whose requests are those of the step before, and whose free blocks and caches
lie as they once did since then, is at rest: it can only repeat itself. Only the other one is played
then, and nothing where both are at rest; the last step is played in full again. Where that is still
more than MAX_EVENTS, steps are left out evenly, and `steps_played` says how many were not.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

from planner.allocator import (
    Alloc,
    AllocatorSettings,
    AllocatorStats,
    DeviceAllocator,
    Event,
    OutOfMemory,
)
from planner.allocator.settings import DEFAULTS, MIN_BLOCK_BYTES, SMALL_BYTES, rounded
from planner.allocator.simulate import Replay
from planner.dtypes import element_bytes
from planner.format import gib
from planner.kbit import held_tensors
from planner.model import Model
from planner.module_order import module_order, one_matrix
from planner.pass_events import PassWriter, script
from planner.program import Dims
from planner.runtimes import runtime_named
from planner.runtimes.base import Phase, Setting
from planner.runtimes.writer import INT64
from planner.tensors import Parameter
from planner.trained.lora import adapter_bytes, adapters
from planner.trained.magnitudes import WORKSPACE, magnitude_events, makes_magnitudes
from planner.trained.prefix_adapters import METHODS as PREFIXES
from planner.trained.prefix_adapters import kept_rows, prefix_adapters
from planner.trained.sharding import lying
from planner.training_events import TRAINING_STEPS, training_events
from planner.workload import Inference, Training

MAX_EVENTS = 100_000
"""Events of decode steps that are played at most: a few tenths of a second."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reserved:
    """The allocator's numbers for a workload, and how many of its decode steps were played.

    `oom`: what could not be served on the device; `stats` are then those of a device without an
    end, what would be needed. `left_out`: what is not played, in words.
    """

    stats: AllocatorStats
    oom: OutOfMemory | None
    steps: int
    steps_played: int
    left_out: str = ""

    @property
    def note(self) -> str:
        """How far the numbers can be trusted, and what torch has to do for them."""
        parts = ["simulated"] + [self.left_out] * bool(self.left_out)
        if self.steps_played != self.steps:
            parts.append(f"{self.steps_played:,} of {self.steps:,} decode steps played")
        if self.oom is not None:
            parts.append(
                f"out of memory at a request of {gib(self.oom.requested_bytes)} with "
                f"{gib(self.oom.reserved_bytes - self.oom.allocated_bytes)} reserved and unused"
            )
        elif self.stats.retries:
            parts.append(f"torch has to empty its cache {self.stats.retries:,} ×")
        return "; ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorPlan:
    """A workload to be played when its numbers are asked for; the same plan is played once.

    `capacity_bytes`: what the device can give torch, its memory less what lies outside torch.
    `from_config`: transformers' class is built on the device, as for the records; else weights are
    brought there. It matters where something lasting is made before the first step: magnitudes.py.
    """

    model: Model
    work: Inference | Training
    setting: Setting
    runtime: str
    workspace_bytes: int
    capacity_bytes: int
    from_config: bool = False

    @property
    def peak_allocated_bytes(self) -> int:
        """Blocks in use at the highest moment."""
        return reserved(self).stats.peak_allocated_bytes

    @property
    def peak_reserved_bytes(self) -> int:
        """Segments held at the highest moment."""
        return reserved(self).stats.peak_reserved_bytes


@lru_cache(maxsize=1024)
def reserved(
    plan: AllocatorPlan, *, settings: AllocatorSettings = DEFAULTS, max_events: int = MAX_EVENTS
) -> Reserved:
    """Play a workload on its device; where it does not fit, on one without an end."""
    stats, played = _play(
        plan, DeviceAllocator(settings, capacity_bytes=plan.capacity_bytes), max_events
    )
    oom = stats.oom
    if oom is not None:
        stats, played = _play(plan, DeviceAllocator(settings), max_events)
    steps = played if isinstance(plan.work, Training) else plan.work.output_tokens - 1
    trains_beside = isinstance(plan.work, Training) and plan.model.quantization is not None
    left_out = "without what quantising on loading left cached" if trains_beside else ""
    return Reserved(stats=stats, oom=oom, steps=steps, steps_played=played, left_out=left_out)


def _play(
    plan: AllocatorPlan, device: DeviceAllocator, max_events: int
) -> tuple[AllocatorStats, int]:
    """Weights, prompt, prefill, decode steps, with how many of the last; or training steps."""
    work = plan.work
    replay = Replay(device)
    if isinstance(work, Training):
        replay.feed(weight_events(plan))
        workspace_bytes, there = plan.workspace_bytes, frozenset[Hashable]()
        if work.adapters is not None and makes_magnitudes(plan.model, work, workspace_bytes):
            made = magnitude_events(
                plan.model,
                work.adapters,
                dtype=plan.setting.held_dtype(work),
                runtime=plan.runtime,
                workspace_bytes=workspace_bytes,
                from_config=plan.from_config,
            )
            replay.feed(made)
            there = frozenset((WORKSPACE,))
        replay.feed(
            training_events(
                plan.model,
                work,
                plan.setting,
                plan.runtime,
                workspace_bytes=workspace_bytes,
                there=there,
            )
        )
        return replay.stats(), TRAINING_STEPS
    replay.feed(weight_events(plan))
    writer = PassWriter(
        batch=work.batch, prompt_tokens=work.prompt_tokens, workspace_bytes=plan.workspace_bytes
    )
    replay.feed(writer.opening)
    if work.padded:
        replay.feed([Alloc("mask of padding", INT64 * work.batch * work.context_tokens)])
    if plan.model.is_seq2seq:
        encoded = plan.model.encoder_length(work.encoder_tokens, work.prompt_tokens)
        replay.feed([Alloc("encoder ids", INT64 * work.batch * encoded)])
    phases = runtime_named(plan.runtime).memory_phases(plan.model, work, plan.setting)
    prefill = phases[0]
    replay.feed(writer.write(script(prefill.program, continues=False), prefill.dims))
    played = _Decode(replay, writer, phases, work).play(max_events) if len(phases) > 1 else 0
    return replay.stats(), played


def weight_events(plan: AllocatorPlan) -> Iterator[Event]:
    """One allocation a stored tensor, embedding first, then the layers, then the rest; buffers."""
    model, dtype, sharding = plan.model, plan.setting.dtype, plan.setting.sharding
    buffers_dtype = dtype
    sizes: dict[Parameter, list[int]] = {}
    if isinstance(plan.work, Training):
        dtype = plan.setting.held_dtype(plan.work)
    if model.quantization is None:
        b, buffers_dtype = element_bytes(dtype), dtype
        for p in model.parameters():
            shape = lying(model, p, inside=p.layer is not None)
            sizes[p] = [b * prod(shape if sharding is None else sharding.shard(shape))]
    elif isinstance(plan.work, Training):
        for p, held in held_tensors(model, dtype, plan.setting.dtype):
            sizes.setdefault(p, []).append(held.size_bytes)
    else:
        for p, stored in model.stored_tensors(dtype):
            each = stored.size_bytes // stored.copies
            sizes.setdefault(p, []).extend([each] * stored.copies)
    if plan.runtime == "litgpt":
        sizes = one_matrix(sizes)
    number = 0
    for p in module_order(sizes, model, runtime=plan.runtime):
        for size in sizes[p]:
            yield Alloc(("weight", number), size)
            number += 1
    if isinstance(plan.work, Training) and plan.work.adapters is not None:
        lora = plan.work.adapters
        for p in adapters(model, lora):
            yield Alloc(("weight", number), p.count * adapter_bytes(lora))
            number += 1
    if isinstance(plan.work, Training) and plan.work.method in PREFIXES:
        b = element_bytes(dtype)
        for p in prefix_adapters(model, plan.work.method):
            yield Alloc(("weight", number), p.count * b)
            number += 1
        for row in kept_rows(model, b):
            for index in range(row.count):
                yield Alloc((row.item, index), row.size_bytes // row.count)
    rows = runtime_named(plan.runtime).buffer_rows(model, dtype=buffers_dtype)
    for place, row in enumerate(rows):  # gemma-3 has two of one name
        for index in range(row.count):
            yield Alloc(("buffer", place, index), row.size_bytes // row.count)


class _Decode:
    """The decode steps of a generation, as many of them as can be afforded."""

    def __init__(
        self, replay: Replay, writer: PassWriter, phases: list[Phase], work: Inference
    ) -> None:
        self._replay, self._writer, self._work = replay, writer, work
        self._first = script(phases[1].program, continues=True)
        self._steady = script(phases[-1].program, continues=True)
        self._last = phases[-1].dims
        self._small, self._large = _Rest(), _Rest()
        self._frees = 0

    def play(self, max_events: int) -> int:
        """Play steps; returns how many, those included that would only repeat others."""
        contexts = range(self._work.prompt_tokens + 1, self._work.context_tokens + 1)
        self._feed(self._writer.write(self._first, self._dims(contexts[0])))
        played = self._middle(contexts[1:-1], max_events)
        if len(contexts) > 1:
            self._feed(self._writer.write(self._steady, self._dims(contexts[-1])))
        return played + min(2, len(contexts))

    def _middle(self, contexts: range, max_events: int) -> int:
        """The steps between the first and the last: all of them, or evenly some."""
        if not contexts:
            return 0
        start, played = self._replay.events, 0
        stride = self._stride(contexts, max_events)
        while contexts and self._replay.oom is None:
            self._step(self._dims(contexts[0]))
            played += 1
            used = self._replay.events - start
            if used > max_events / 2:  # pools found less rest than was hoped for
                expected = len(contexts) * used // played
                stride = max(stride, -(-expected // max(1, max_events - used)))
            contexts = contexts[stride:]
        return played

    def _step(self, dims: Dims) -> None:
        """One step: both pools, the large one alone, or nothing at all."""
        sizes = {buffer: rounded(size) for buffer, size in self._steady.sizes(dims).items()}
        large = frozenset(buffer for buffer, size in sizes.items() if size > SMALL_BYTES)
        small_requests = frozenset(pair for pair in sizes.items() if pair[0] not in large)
        large_requests = frozenset(pair for pair in sizes.items() if pair[0] in large)
        if self._replay.device.device_frees != self._frees:  # segments went, of either pool
            self._frees = self._replay.device.device_frees
            self._small, self._large = _Rest(), _Rest()
        small_rests = self._small.rests(small_requests)
        large_rests = self._large.rests(large_requests)
        if small_rests and large_rests:
            return
        if small_rests:
            self._feed(self._writer.write_only(self._steady, dims, large))
        else:
            self._feed(self._writer.write(self._steady, dims))
            self._small.note(small_requests, self._state(is_small=True))
        self._large.note(large_requests, self._state(is_small=False))

    def _stride(self, contexts: range, max_events: int) -> int:
        """One step in so many is played, so that all of them stay below `max_events`.

        A step is full where a small request changes its rounded size, and twice more until the pool
        is at rest again.
        """
        first = self._steady.sizes(self._dims(contexts[0]))
        last = self._steady.sizes(self._dims(contexts[-1]))
        changes = sum(
            (rounded(last[buffer]) - rounded(first[buffer])) // MIN_BLOCK_BYTES
            for buffer in first
            if rounded(first[buffer]) <= SMALL_BYTES
        )
        buffers, steps = self._steady.buffers, self._steady.steps
        full_cost = len(steps)
        light_cost = sum(first[buffers[slot]] > SMALL_BYTES for _, slot in steps)
        stride = 1
        while True:
            played = -(-len(contexts) // stride)
            full = min(played, 3 * (changes + 1))
            if played == 1 or full * full_cost + (played - full) * light_cost <= max_events:
                return stride
            stride += 1 + stride // 8

    def _feed(self, events: list[Event]) -> None:
        self._replay.feed(events)

    def _state(self, *, is_small: bool) -> Hashable:
        """How the free blocks of one pool lie, and the storages that live on after a step."""
        live = self._replay.live
        kept = [live.get(name) for name in (self._writer.token, *self._writer.cache_names)]
        return (
            *(tuple(p.keys) for p in self._replay.device.pools() if p.is_small == is_small),
            *(b.address for b in kept if b is not None and b.pool.is_small == is_small),
        )

    def _dims(self, context: int) -> Dims:
        return replace(self._last, context=context)


class _Rest:
    """Whether a pool can only repeat itself: the same requests, a state that it had before."""

    def __init__(self) -> None:
        self._requests: Hashable = None
        self._seen: set[Hashable] = set()
        self._repeats = False

    def rests(self, requests: Hashable) -> bool:
        """Whether a step with these requests changes nothing that was not there before."""
        return self._repeats and requests == self._requests

    def note(self, requests: Hashable, state: Hashable) -> None:
        """The state after a step with these requests."""
        if requests != self._requests:
            self._requests, self._seen = requests, set()
        self._repeats = state in self._seen
        self._seen.add(state)
