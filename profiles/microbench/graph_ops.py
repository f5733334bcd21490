"""A CUDA graph's replay: of one tiny kernel many times, of several kinds alone and in turn.

What a kernel takes longer that follows one of another kind is the difference: a graph of unlike
kernels less the mean of the graphs of each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from profiles.microbench.buffers import DTYPES
from profiles.microbench.ops import Call
from profiles.microbench.point import OpPoint
from profiles.microbench.timing import REPLAYS, Timing, capture_graph, synchronize, timing_event

UNLIKE = ("add", "mean", "cat", "silu", "mul")
"""Of a norm and a gated feed-forward."""
UNLIKE_PRODUCTS = ("add", "mean", "linear", "silu", "linear", "mul")
"""With products among them, as in a layer."""
ALIKE = "alike_"
WIDTH = 64
REPLAYS_AT_ONCE = 20


def graph_time(point: OpPoint, device: torch.device) -> Timing:
    """One replay of a graph of tiny kernels: its time on the device, or the host's to launch it."""
    calls = _graph_calls(point, device)
    for call in calls[:20]:
        call()
    synchronize(device)
    graph, kept = capture_graph(calls)
    graph.replay()
    synchronize(device)
    if point.op == "launch":
        return _launched(graph.replay, device)
    samples = []
    for _ in range(REPLAYS):
        start, end = timing_event(), timing_event()
        start.record()
        for _ in range(REPLAYS_AT_ONCE):
            graph.replay()
        end.record()
        synchronize(device)
        samples.append(start.elapsed_time(end) / 1e3 / REPLAYS_AT_ONCE)
    del kept
    return Timing(method="replay", samples_s=tuple(samples), copies=REPLAYS_AT_ONCE)


def _graph_calls(point: OpPoint, device: torch.device) -> list[Call]:
    if "width" in point.shape:
        return unlike_calls(point, device)
    x, y = torch.randn(WIDTH, device=device), torch.randn(WIDTH, device=device)
    return [lambda: x.add_(y, alpha=1e-3)] * point.shape["kernels"]


def _launched(call: Callable[[], None], device: torch.device) -> Timing:
    """The host's time in single calls, the device idle before each."""
    samples = []
    for _ in range(REPLAYS):
        synchronize(device)
        started = time.perf_counter()
        call()
        samples.append(time.perf_counter() - started)
    synchronize(device)
    return Timing(method="host", samples_s=tuple(samples), copies=1)


def kinds_of(op: str) -> tuple[str, ...]:
    """The kinds that an op's kernels are in turn."""
    if op.startswith(ALIKE):
        return (op.removeprefix(ALIKE),)
    return {"unlike": UNLIKE, "unlike_products": UNLIKE_PRODUCTS}[op]


def unlike_calls(point: OpPoint, device: torch.device) -> list[Call]:
    """So many kernels, one a call."""
    width, dtype = point.shape["width"], DTYPES[point.dtype]
    x, y = (torch.randn(1, width, device=device, dtype=dtype) for _ in range(2))
    kernels = {kind: _kernel(kind, x, y) for kind in kinds_of(point.op)}
    return [kernels[kind] for kind in islice(cycle(kinds_of(point.op)), point.shape["kernels"])]


def _kernel(kind: str, x: Tensor, y: Tensor) -> Call:
    half = x.shape[-1] // 2
    kernels: dict[str, Callable[[], Tensor]] = {
        "add": lambda: x + y,
        "mean": lambda: x.mean(-1, keepdim=True),
        "cat": lambda: torch.cat((x[:, half:], y[:, :half]), dim=-1),
        "silu": lambda: nn.functional.silu(x),
        "mul": lambda: x * y,
    }
    if kind == "linear":
        w = torch.randn(x.shape[-1], x.shape[-1], device=x.device, dtype=x.dtype)
        return lambda: nn.functional.linear(x, w)
    return kernels[kind]
