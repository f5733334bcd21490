"""How long one call of an op takes on its device, and what issuing it costs the host.

On CUDA the op is captured some twenty times, over different inputs, into one graph, and the graph's
replays are timed with events: no launch cost is in the result, and no input is in the cache that
would not be there in a model. What cannot be captured is issued call by call behind a kernel that
keeps the device busy meanwhile. On a CPU calls are timed by the clock.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from profiles.microbench.ops import Call

REPLAYS = 5
REPLAY_S = 2e-3
"""A replay has at least so much work, where that takes no more calls than MOST_COPIES."""
LONGEST_REPLAY_S = 40e-3
COPIES, MOST_COPIES = 4, 128
KEPT_BYTES = 8 * 2**30
"""Outputs that all copies together may hold."""
SPIN_HZ = 1.9e9
"""Clock at which torch.cuda._sleep counts: a little fast, so that the head start is long enough."""
HOST_CALLS = 200
SUSTAINED_S = 1.5
"""Long enough for the energy counter, which steps every 20–100 ms, and for the power limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Seconds of one call, as each of a few samples saw it."""

    method: str  # "graph", "loop", "clock" (a CPU), "host", "replay"
    samples_s: tuple[float, ...]
    copies: int  # calls in one sample
    note: str | None = None
    energy_j: float | None = None  # of one call, where a window of a second and more was read


def time_on_device(
    prepare: Callable[[], Call],
    device: torch.device,
    *,
    cold_copies: int,
    warm: bool = False,
    capture: bool = True,
) -> Timing:
    """Time an op; `prepare` gives it over new inputs each time.

    `cold_copies` calls touch more than the cache holds. `warm`: all calls share their inputs.
    """
    first = prepare()
    estimate_s, call_bytes = _estimate(first, device)
    copies = copies_for(estimate_s, call_bytes, cold_copies=1 if warm else cold_copies)
    calls = [first] * copies if warm else [first, *(prepare() for _ in range(copies - 1))]
    if device.type == "cpu":
        return Timing(method="clock", samples_s=_clock_samples(calls), copies=copies)
    if not capture:
        return Timing(method="loop", samples_s=_loop_samples(calls), copies=copies)
    try:
        return Timing(method="graph", samples_s=_graph_samples(calls), copies=copies)
    except RuntimeError as error:
        note = f"not captured: {_first_line(error)}"
    leave_stream()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return Timing(method="loop", samples_s=_loop_samples(calls), copies=copies, note=note)


def copies_for(estimate_s: float, call_bytes: int, *, cold_copies: int) -> int:
    """Calls in a sample: enough work to time, cold inputs, and no more memory or time than fits."""
    wanted = max(COPIES, math.ceil(REPLAY_S / estimate_s), cold_copies)
    fits = max(1, KEPT_BYTES // max(1, call_bytes))
    quick = max(2, int(LONGEST_REPLAY_S / estimate_s))
    return min(wanted, MOST_COPIES, fits, quick)


def time_sustained(
    prepare: Callable[[], Call],
    device: torch.device,
    energy_j: Callable[[], float | None],
    *,
    seconds: float = SUSTAINED_S,
) -> Timing:
    """Mean time and energy of a call when the device does nothing else for more than a second."""
    first = prepare()
    estimate_s, call_bytes = _estimate(first, device)
    copies = copies_for(estimate_s, call_bytes, cold_copies=1)
    calls = [first, *(prepare() for _ in range(copies - 1))]
    if device.type == "cuda":
        graph, kept = capture_graph(calls)
        issue: Callable[[], None] = graph.replay
    else:
        kept = []

        def issue() -> None:
            for call in calls:
                call()

    synchronize(device)
    before_j, started_s, done = energy_j(), time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - started_s) < seconds:
        issue()
        synchronize(device)
        done += copies
    after_j = energy_j()
    del kept
    spent_j = None if before_j is None or after_j is None else (after_j - before_j) / done
    return Timing(method="sustained", samples_s=(elapsed_s / done,), copies=done, energy_j=spent_j)


def time_idle(energy_j: Callable[[], float | None], *, seconds: float = SUSTAINED_S) -> Timing:
    """What a device takes that has nothing to do: the "call" is the whole window."""
    before_j, started_s = energy_j(), time.perf_counter()
    time.sleep(seconds)
    after_j, elapsed_s = energy_j(), time.perf_counter() - started_s
    spent_j = None if before_j is None or after_j is None else after_j - before_j
    return Timing(method="sustained", samples_s=(elapsed_s,), copies=1, energy_j=spent_j)


def time_on_host(
    call: Call, device: torch.device, *, calls: int = HOST_CALLS, warmup: int = 20
) -> Timing:
    """What one call costs the thread that issues it, while the device keeps up."""
    for _ in range(warmup):
        call()
    samples = []
    for _ in range(REPLAYS):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - started) / calls)
    synchronize(device)
    return Timing(method="host", samples_s=tuple(samples), copies=calls)


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def capture_graph(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, list[object]]:
    """A graph of these calls on the current stream, and their outputs, which it writes into."""
    graph = torch.cuda.CUDAGraph()
    outputs: list[object] = []
    gc.disable()  # an older graph that is collected meanwhile would spoil the capture
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for call in calls:
                outputs.append(call())
    finally:
        gc.enable()
    return graph, outputs


def leave_stream() -> None:
    """Go on with another stream: one whose capture failed may not be of use any more."""
    torch.cuda.set_stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


def timing_event() -> torch.cuda.Event:
    """An event that knows when it was reached."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _estimate(call: Call, device: torch.device) -> tuple[float, int]:
    """Rough seconds of a call, after two that load its kernels, and the bytes it allocates."""
    call()
    call()
    synchronize(device)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    for _ in range(2):
        call()
    synchronize(device)
    estimate_s = max((time.perf_counter() - started) / 2, 1e-7)
    return estimate_s, torch.cuda.max_memory_allocated(device) - before if cuda else 0


def _graph_samples(calls: Sequence[Call]) -> tuple[float, ...]:
    graph, outputs = capture_graph(calls)
    graph.replay()  # the first one uploads the graph
    torch.cuda.synchronize()
    samples = _event_samples(graph.replay, len(calls))
    del outputs
    graph.reset()
    return samples


def _loop_samples(calls: Sequence[Call]) -> tuple[float, ...]:
    """Issue all calls while the device sleeps, so that it then runs them without gaps."""
    started = time.perf_counter()
    for call in calls:
        call()
    issue_s = time.perf_counter() - started
    torch.cuda.synchronize()
    head_start_s = min(1.5 * issue_s + 1e-4, 0.05)

    def issue() -> None:
        for call in calls:
            call()

    return _event_samples(issue, len(calls), head_start_s=head_start_s)


def _event_samples(
    issue: Callable[[], None], calls: int, *, head_start_s: float = 0.0
) -> tuple[float, ...]:
    pairs = []
    for _ in range(REPLAYS):
        start, end = timing_event(), timing_event()
        if head_start_s:
            torch.cuda._sleep(int(head_start_s * SPIN_HZ))  # type: ignore[no-untyped-call]
        start.record()
        issue()
        end.record()
        if head_start_s:
            torch.cuda.synchronize()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return tuple(start.elapsed_time(end) / 1e3 / calls for start, end in pairs)


def _clock_samples(calls: Sequence[Call]) -> tuple[float, ...]:
    samples = []
    for _ in range(REPLAYS):
        started = time.perf_counter()
        for call in calls:
            call()
        samples.append((time.perf_counter() - started) / len(calls))
    return tuple(samples)


def own_stream(device: torch.device) -> torch.cuda.StreamContext | nullcontext[None]:
    """A stream of our own to warm up, capture and replay on: the default one cannot be captured.

    One stream for all, so that cuBLAS has its workspace there before the first capture.
    """
    if device.type != "cuda":
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream())  # type: ignore[no-untyped-call]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
