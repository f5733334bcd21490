"""One point of a suite, from an untouched device to its record, in a process of its own."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch

import planner
from planner import Model
from profiles import environment, nvml, records
from profiles.bench import attempt
from profiles.history import recorded
from profiles.measurement import record_of
from profiles.points import Point, SuitePoint, built_dtype, planned_dtype
from profiles.records import Record
from profiles.sampler import Sampler
from profiles.training_bench import TrainingBench
from profiles.workloads import Workload, build


def measure(
    point: SuitePoint, *, suite: str, device: str, index: int = 0, histories: Path | None = None
) -> Record:
    """Build the model with random weights, measure, and say how it ended.

    `device`: "cuda" (torch's `index`-th) or "cpu". The process must not have touched it before. Of
    a point whose allocator's history is wanted, that is all that is measured: it goes to a file in
    `histories`.
    """
    model = planner.load_model(point.source)
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
        if point.history and histories is not None and bench.on_cuda:
            status = _recorded(model, point, bench, values, histories)
        elif point.series and bench.on_cuda:
            status = _sampled(model, point, bench, values)
        else:
            status = _measure(model, point, bench, values)
        return _record(model, point, suite, status, values, env)


def unmeasured(point: SuitePoint, *, suite: str, status: str, like: records.Environment) -> Record:
    """The record of a point whose process gave no answer."""
    return _record(planner.load_model(point.source), point, suite, status, {}, like)


def _recorded(
    model: Model,
    point: SuitePoint,
    bench: TrainingBench,
    values: dict[str, Any],
    histories: Path,
) -> str:
    """The passes of a user's process with the allocator's history, from the first weight on."""
    name = "".join(c if c.isalnum() else "-" for c in point.name).strip("-") + ".json.gz"

    def run() -> None:
        with recorded() as history:
            workload = built(model, point, bench.device)
            if isinstance(point.run, Point):
                values.update(bench.cuda_memory(workload, point.run))
            else:
                dtype = computed_in(model, point)
                training = bench.run(workload, point.run, dtype=dtype)
                values.update(bench.step_peaks(training, point.run))
        history.write(histories / name, about={"point": point.name, "gpu": bench.device_name})
        values["history"] = name

    return attempt(run)[1]


def _sampled(model: Model, point: SuitePoint, bench: TrainingBench, values: dict[str, Any]) -> str:
    """As `_measure`, with NVML's series until the peaks are taken: the timed passes run alone."""
    sampler = Sampler(bench.driver)
    with ExitStack() as sampling:
        sampling.enter_context(sampler)

        def mark(what: str) -> None:
            sampler.mark(what)
            if what == "end":
                sampling.close()

        bench.mark = mark
        status = _measure(model, point, bench, values)
    values["series"] = sampler.series.to_json_dict()
    return status


def _measure(model: Model, point: SuitePoint, bench: TrainingBench, values: dict[str, Any]) -> str:
    bench.mark("load")
    workload, status = attempt(lambda: built(model, point, bench.device))
    if workload is None:
        return status
    if isinstance(point.run, Point):
        return bench.measure(workload, point.run, values, times_only=point.times_only)
    dtype = computed_in(model, point)
    return bench.train(workload, point.run, values, dtype=dtype, times_only=point.times_only)


def computed_in(model: Model, point: SuitePoint) -> str:
    """The dtype of products: of a run in fp32 with autocast, that of autocast."""
    dtype = planned_dtype(point.run.work, point.dtype or model.dtype)
    assert dtype is not None
    return dtype


def built(model: Model, point: SuitePoint, device: torch.device) -> Workload:
    """The point's model with random weights, over the cache that it asks for."""
    return build(
        model,
        runtime=point.runtime,
        attention=point.attention,
        dtype=built_dtype(point.run.work, point.dtype or model.dtype),
        device=device,
        kv_dtype=point.kv_dtype,
        cache=point.cache,
    )


def _record(
    model: Model,
    point: SuitePoint,
    suite: str,
    status: str,
    seen: dict[str, Any],
    env: records.Environment,
) -> Record:
    return record_of(
        model,
        point.run,
        runtime=point.runtime,
        attention=point.attention,
        dtype=point.dtype or model.dtype,
        status=status,
        seen=seen,
        env=env,
        kv_dtype=point.kv_dtype,
        cache=point.cache,
        suite=suite,
        split=point.split,
        point=point.name,
    )
