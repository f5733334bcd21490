"""python -m profiles.kernel_times: which kernels a pass runs, how often, and how long they take.

Under torch's profiler, which slows the host (each op by a microsecond or two) but not the kernels;
a record's times are measured without it. One line of JSON a pass: rows of (op that launched it,
shapes of its inputs, kernel, count, seconds), the longest first, to be laid beside
`Estimate.op_times()`; and the calls that Python made of torch, with the host's seconds in them and
between them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import planner
from planner import ConfigError
from profiles import environment, graph_step, records
from profiles.points import Point, SuitePoint
from profiles.suites import SUITES, suite_points
from profiles.training_bench import TrainingBench
from profiles.worker import built, computed_in

WARMUP = 2
"""Passes before the one that is traced, and decode steps of each."""
COPIES = ("gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTime:
    """What one op, over inputs of these shapes, spent in one kernel during a pass."""

    op: str
    shapes: str
    kernel: str
    count: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HostTime:
    """What the host spent in calls of one op, those that it makes in turn included."""

    op: str
    count: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PassTimes:
    """The kernels of a pass; its calls of torch, and the host's time from the first to the last."""

    kernels: list[KernelTime]
    calls: list[HostTime]
    host_s: float


def pass_times(run: Callable[[], object], *, on_cuda: bool) -> PassTimes:
    """Of one call of `run`. On a CPU ops, with what they call in them, stand for kernels."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if on_cuda:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        run()
        if on_cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    events = trace["traceEvents"]
    calls, host_s = calls_of(events)
    kind = "kernel" if on_cuda else "cpu_op"
    return PassTimes(kernels=kernels_of(events, kind=kind), calls=calls, host_s=host_s)


def calls_of(events: Sequence[Mapping[str, Any]]) -> tuple[list[HostTime], float]:
    """The outermost ops of each thread, the longest in all first; from the first's begin to the
    last's end, threads added up.
    """
    threads: dict[object, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "cpu_op":
            threads.setdefault(event.get("tid"), []).append(event)
    counts, seconds, span_s = Counter[str](), Counter[str](), 0.0
    for ops in threads.values():
        end = begin = min(op["ts"] for op in ops)
        for op in sorted(ops, key=lambda op: (op["ts"], -op["dur"])):
            if op["ts"] >= end:
                counts[op["name"]] += 1
                seconds[op["name"]] += op["dur"] / 1e6
                end = op["ts"] + op["dur"]
        span_s += (end - begin) / 1e6
    rows = [HostTime(op=op, count=counts[op], seconds=s) for op, s in seconds.items()]
    return sorted(rows, key=lambda row: -row.seconds), span_s


def kernels_of(events: Sequence[Mapping[str, Any]], *, kind: str) -> list[KernelTime]:
    """Rows of a trace of Chrome's; `kind` is the category of what took the time.

    A kernel names the op that launched it by its "External id"; one of a graph names none.
    """
    ops = {_id(e): e for e in events if e.get("cat") == "cpu_op"}
    counts, seconds = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
    for event in events:
        if event.get("cat") != kind and not (kind == "kernel" and event.get("cat") in COPIES):
            continue
        launched = ops.get(_id(event), {})
        key = (str(launched.get("name", "")), _shapes(launched), str(event["name"]))
        counts[key] += 1
        seconds[key] += event["dur"] / 1e6
    rows = [
        KernelTime(op=op, shapes=shapes, kernel=kernel, count=counts[op, shapes, kernel], seconds=s)
        for (op, shapes, kernel), s in seconds.items()
    ]
    return sorted(rows, key=lambda row: -row.seconds)


def _id(event: Mapping[str, Any]) -> object:
    return event.get("args", {}).get("External id")


def _shapes(op: Mapping[str, Any]) -> str:
    """ "4×2048 2048×8": dimensions of the inputs that have any."""
    inputs = op.get("args", {}).get("Input Dims", [])
    return " ".join("×".join(map(str, dims)) for dims in inputs if dims)


def passes(point: SuitePoint, device: torch.device) -> dict[str, PassTimes]:
    """Of a point: its prefill and a decode step, or a training step, after warm-up."""
    model = planner.load_model(point.source)
    workload, bench = built(model, point, device), TrainingBench(device, None, None)
    traced = partial(pass_times, on_cuda=bench.on_cuda)
    if not isinstance(point.run, Point):
        training = bench.run(workload, point.run, dtype=computed_in(model, point))
        for _ in range(WARMUP):
            training.step()
        return {"training": traced(training.step)}
    decodes = point.run.output_tokens > 1
    run = replace(point.run, output_tokens=1 + WARMUP if decodes else 1)
    ids = bench.prompt(workload, run)

    def tokens() -> Iterator[Tensor]:
        workload.reset()
        return workload.tokens(ids, output_tokens=run.output_tokens, logits=run.logits)

    workload.begin(batch=run.batch, capacity_tokens=run.context_tokens)
    for _ in range(WARMUP):
        for _ in tokens():
            pass
    steps = tokens()
    found = {"prefill": traced(partial(next, steps))}
    if decodes:
        token = next(steps)
        if run.mode == "graph":
            step = graph_step.capture(workload, token, run.logits)
            step.replay()
            found["replay"] = traced(step.replay)
        else:
            found["decode"] = traced(partial(next, steps))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Trace the points named; each phase's rows are appended to the file, and its total printed."""
    parser = argparse.ArgumentParser(prog="python -m profiles.kernel_times", description=__doc__)
    parser.add_argument("point", nargs="+", metavar="SUITE:POINT", help="suite and point's name")
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--out", type=Path, default=Path("measurements/kernel_times.jsonl"))
    asked = parser.parse_args(arguments)
    try:
        device = environment.find_device(asked.device)
        records.check_writable(asked.out)
        for name in asked.point:
            for phase, made in passes(_point(name), device).items():
                line = {"point": name, "phase": phase, **asdict(made)}
                records.append_lines(asked.out, [json.dumps(line)])
                kernels_s = sum(row.seconds for row in made.kernels)
                print(f"{kernels_s * 1e3:9.3f} ms of kernels  {phase:8}  {name}")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _point(name: str) -> SuitePoint:
    suite, _, wanted = name.partition(":")
    if suite not in SUITES:
        raise ConfigError(f"SUITE:POINT={name!r} is not allowed: a suite of {', '.join(SUITES)}")
    found = {point.name: point for point in suite_points(suite)}
    if wanted not in found:
        raise ConfigError(f"{suite} has no point {wanted!r}: its first is {next(iter(found))!r}")
    return found[wanted]


if __name__ == "__main__":
    sys.exit(main())
