"""python -m profiles.kernel_times: which kernels a pass runs, how often, and how long they take.

Under torch's profiler, whose readings disturb the host but not the kernels; a record's times are
measured without it. One line of JSON a pass: rows of (op that launched it, shapes of its inputs,
kernel, count, seconds), the longest first, to be laid beside `Estimate.latency.op_table()`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import planner
from planner import ConfigError
from profiles import environment, graph_step, records
from profiles.bench import random_ids
from profiles.points import Point, SuitePoint
from profiles.suites import SUITES, suite_points
from profiles.training_bench import TrainingRun
from profiles.workloads import build

WARMUP = 2
COPIES = ("gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTime:
    """What one op, over inputs of these shapes, spent in one kernel during a pass."""

    op: str
    shapes: str
    kernel: str
    count: int
    seconds: float


def kernel_times(run: Callable[[], object]) -> list[KernelTime]:
    """The kernels of one call of `run`, the longest in all first.

    Without a GPU its ops, each with the time of those that it calls.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    return read(trace["traceEvents"], kind="kernel" if torch.cuda.is_available() else "cpu_op")


def read(events: Sequence[Mapping[str, Any]], *, kind: str) -> list[KernelTime]:
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


def passes(point: SuitePoint, device: torch.device) -> dict[str, list[KernelTime]]:
    """Of a point: its prefill and a decode step, or a training step, after warm-up."""
    model = planner.load_model(point.model)
    workload = build(
        model,
        runtime=point.runtime,
        attention=point.attention,
        dtype=point.dtype or model.dtype,
        device=device,
    )
    run = point.run
    if not isinstance(run, Point):
        work = run.work
        ids = random_ids(workload.vocab_size, work.batch, work.sequence_tokens).to(device)
        training = TrainingRun(workload, work, ids)
        for _ in range(WARMUP):
            training.step()
        return {"training": kernel_times(training.step)}
    found: dict[str, list[KernelTime]] = {}
    ids = random_ids(workload.vocab_size, run.batch, run.prompt_tokens).to(device)
    workload.begin(batch=run.batch, capacity_tokens=run.prompt_tokens + WARMUP + 2)
    for _ in range(WARMUP):
        workload.reset()
        tokens = workload.tokens(ids, output_tokens=WARMUP, logits=run.logits)
        for _ in tokens:
            pass
    workload.reset()
    tokens = workload.tokens(ids, output_tokens=3, logits=run.logits)
    found["prefill"] = kernel_times(partial(next, tokens))
    if run.output_tokens > 1:
        token = next(tokens)
        if run.mode == "graph":
            step = graph_step.capture(workload, token, run.logits)
            step.replay()
            found["replay"] = kernel_times(step.replay)
        else:
            found["decode"] = kernel_times(partial(next, tokens))
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
            for phase, rows in passes(_point(name), device).items():
                line = {"point": name, "phase": phase, "rows": [asdict(row) for row in rows]}
                records.append_lines(asked.out, [json.dumps(line)])
                print(f"{sum(row.seconds for row in rows) * 1e3:9.3f} ms  {phase:8}  {name}")
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
