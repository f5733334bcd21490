"""One point of a suite, from an untouched device to its record, in a process of its own."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

import planner
from planner import Model
from profiles import environment, nvml, records
from profiles.bench import attempt
from profiles.points import Point, SuitePoint
from profiles.records import Record
from profiles.training_bench import TrainingBench
from profiles.workloads import RUNTIMES, build

SIZES = ("batch", "sequence_tokens")


def measure(point: SuitePoint, *, suite: str, device: str, index: int = 0) -> Record:
    """Build the model with random weights, measure, and say how it ended.

    `device`: "cuda" (torch's `index`-th) or "cpu". The process must not have touched it before.
    """
    model = planner.load_model(point.model)
    before = nvml.used_bytes_by_uuid() if device == "cuda" else {}
    target = environment.find_device(device)
    if target.type == "cuda":
        target = torch.device("cuda", index)
        torch.cuda.set_device(target)
    uuid = environment.device_uuid(target)
    values: dict[str, Any] = {}
    with ExitStack() as stack:
        driver = stack.enter_context(nvml.open_device(uuid) if uuid else nullcontext())
        env = environment.describe(target, driver)
        bench = TrainingBench(target, driver, before.get(uuid) if uuid else None)
        bench.mark("load")
        status = _measure(model, point, bench, values)
        clocks = values.pop("clocks", {})
        return _record(model, point, suite, status, values, replace(env, **clocks))


def unmeasured(point: SuitePoint, *, suite: str, status: str, like: records.Environment) -> Record:
    """The record of a point whose process gave no answer."""
    return _record(planner.load_model(point.model), point, suite, status, {}, like)


def _measure(model: Model, point: SuitePoint, bench: TrainingBench, values: dict[str, Any]) -> str:
    dtype = point.dtype or model.dtype
    workload, status = attempt(
        lambda: build(
            model,
            runtime=point.runtime,
            attention=point.attention,
            dtype=dtype,
            device=bench.device,
        )
    )
    if workload is None:
        return status
    if isinstance(point.run, Point):
        return bench.measure(workload, point.run, values)
    return bench.train(workload, point.run, values)


def _record(
    model: Model,
    point: SuitePoint,
    suite: str,
    status: str,
    values: dict[str, Any],
    env: records.Environment,
) -> Record:
    dtype = point.dtype or model.dtype
    return records.create(
        suite=suite,
        split=point.split,
        point=point.name,
        status=status,
        model=model.name,
        config=model.config,
        runtime=point.runtime,
        runtime_version=environment.installed(RUNTIMES[point.runtime].distribution),
        dtype=dtype,
        kv_dtype=dtype,
        mode="eager",
        environment=env,
        **{"attention": point.attention} | _work(point) | values,
    )


def _work(point: SuitePoint) -> dict[str, Any]:
    run = point.run
    if isinstance(run, Point):
        return {
            "phase": run.phase,
            "batch": run.batch,
            "prompt_tokens": run.prompt_tokens,
            "output_tokens": run.output_tokens,
            "context_tokens": None if run.phase == "prefill" else run.context_tokens,
            "logits": run.logits,
        }
    work = run.work
    return {
        "phase": "training",
        "batch": work.batch,
        "prompt_tokens": work.sequence_tokens,
        "output_tokens": 1,
        "logits": "all",
        "step": {k: v for k, v in asdict(work).items() if k not in SIZES},
    }
