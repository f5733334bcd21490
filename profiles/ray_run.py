"""A suite over the GPUs of several machines: Ray places the points, the worker is the same.

    run_on_ray("inference", address="auto", out="measurements/cluster.jsonl")

A task takes one GPU (on machines without any, one CPU) and a group of points; each point still runs
in a process of its own, and its record comes back to be stored here as soon as its group is done.
Ray is an optional extra: `pip install 'transformer-planner[cluster]'`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from planner import ConfigError
from planner.errors import check_choice, check_size
from profiles import records
from profiles.isolated import run_isolated
from profiles.points import SuitePoint
from profiles.records import Record
from profiles.suite_run import POINT_TIMEOUT_S, Progress, Run, look, measured_point, unmeasured
from profiles.suites import suite_points

DEVICES = ("cuda", "cpu")


def run_on_ray(
    name: str,
    *,
    address: str | None,
    device: str = "cuda",
    out: Path | str,
    points_per_task: int = 4,
    points: Sequence[SuitePoint] | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Run:
    """Measure the points of a suite wherever Ray has a device free; `address` None: here.

    Raises ConfigError where ray is not installed or its cluster not there.
    """
    check_choice("device", device, DEVICES)
    check_size("points_per_task", points_per_task)
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "ray is not installed: pip install 'transformer-planner[cluster]'"
        ) from None
    wanted = list(points if points is not None else suite_points(name))
    records.check_writable(out)
    try:
        ray.init(address=address, include_dashboard=False, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"address={address!r} is no Ray cluster: {error}") from None
    try:
        return _run(ray, name, wanted, device, Path(out), points_per_task, on_progress)
    finally:
        ray.shutdown()


def _run(
    ray: Any,
    name: str,
    points: Sequence[SuitePoint],
    device: str,
    out: Path,
    points_per_task: int,
    on_progress: Callable[[Progress], None],
) -> Run:
    started_s, done = time.monotonic(), list[Record]()
    needs = {"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}
    task = ray.remote(measured_group).options(**needs, max_retries=0)
    waiting = [task.remote(group, name, device) for group in _groups(points, points_per_task)]
    skipped: list[str] = []
    while waiting:
        (ready,), waiting = ray.wait(waiting, num_returns=1)
        try:
            lines: list[str] = ray.get(ready)
        except ray.exceptions.RayError as error:  # a machine is gone: its group is missing, no more
            skipped.append(f"a group of points: {type(error).__name__}")
            continue
        for line in lines:
            record = records.from_json(line)
            records.append(out, record)
            done.append(record)
            on_progress(
                Progress(
                    done=len(done),
                    total=len(points),
                    elapsed_s=time.monotonic() - started_s,
                    what=record.point or record.model,
                    record=record,
                )
            )
    return Run(records=tuple(done), skipped=tuple(skipped))


def measured_group(points: Sequence[SuitePoint], suite: str, device: str) -> list[str]:
    """The records of some points as lines of JSON, measured on the task's own device."""
    lines = []
    for point in points:
        ended = run_isolated(
            measured_point, (point, suite, device, 0, ""), timeout_s=POINT_TIMEOUT_S
        )
        record = ended.answer
        if record is None:
            here = run_isolated(look, (device,), timeout_s=POINT_TIMEOUT_S)
            if here.problem is not None:
                raise RuntimeError(here.problem)
            status = f"error: {ended.problem}"
            record = unmeasured(point, suite, status, here.answer[0].environment)
        lines.append(records.to_json(record))
    return lines


def _groups(points: Sequence[SuitePoint], size: int) -> Iterator[Sequence[SuitePoint]]:
    for start in range(0, len(points), size):
        yield points[start : start + size]
