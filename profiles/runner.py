"""Measure one model here and now: a record for each phase, on disk before the next phase begins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

import planner
from planner import ConfigError, Model
from planner.errors import check_choice
from planner.format import gib
from profiles import environment, nvml, records
from profiles.bench import Bench, attempt
from profiles.measurement import record_of
from profiles.points import GENERATIVE, Logits, Point, inference_points, kept_dtype
from profiles.records import DEFAULT_OUT, Record
from profiles.workloads import RUNTIMES, TORCH_DTYPES, build, check_generates

Progress = Callable[[int, int, str], None]
"""Called with (steps done, steps in all, what comes next)."""


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
    kv_dtype: str | None = None,
    cache: planner.CacheSpec | None = None,
    phases: Iterable[str] = GENERATIVE,
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
    is left out. `kv_dtype` and `cache` as of a Deployment. An error or a lack of memory on the way
    becomes a record with that status. Raises ConfigError, before anything is built, for arguments
    that cannot be right and for work that by our own estimate needs more memory than is free.
    """
    points = inference_points(
        phases,
        batch=batch,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        logits=logits,
        repeats=repeats,
        warmup=warmup,
    )
    check_choice("runtime", runtime, RUNTIMES)
    if runtime == "transformers":
        check_generates(model.model_type)
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
            kv_dtype=kept_dtype(dtype, kv_dtype, cache),
            cache=cache,
            mode="eager",
        )
        _refuse_what_does_not_fit(model, points, deploy, env.gpu, environment.free_bytes(target))
        records.check_writable(out)
        report(0, 1 + len(points), f"build {model.name}")
        workload, status = attempt(
            lambda: build(
                model,
                runtime=runtime,
                attention=attention,
                dtype=dtype,
                device=target,
                kv_dtype=kv_dtype,
                cache=cache,
            )
        )
        bench = Bench(target, driver, before.get(uuid) if uuid else None)
        done: list[Record] = []
        for index, point in enumerate(points, start=1):
            report(index, 1 + len(points), point.phase)
            seen: dict[str, Any] = {}
            if workload is not None:
                status = bench.measure(workload, point, seen)
            record = record_of(
                model,
                point,
                runtime=runtime,
                attention=attention,
                dtype=dtype,
                status=status,
                seen=seen,
                env=env,
                kv_dtype=kv_dtype,
                cache=cache,
                suite=suite,
                split=split,
            )
            records.append(out, record)
            done.append(record)
        report(1 + len(points), 1 + len(points), "done")
    return done


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
    estimate = planner.estimate(model, largest.work, deploy)
    memory = estimate.memory
    needed_bytes = memory.peak_live_bytes if gpu is None else memory.peak_allocated_bytes
    if needed_bytes > free_bytes or (gpu is not None and not estimate.fits):
        raise ConfigError(
            f"{model.name} with batch={largest.batch}, {largest.context_tokens} tokens in "
            f"{deploy.dtype} needs {gib(needed_bytes)}, {gib(free_bytes)} available"
        )


@cache
def _used_before_bytes() -> dict[str, int]:
    """Used on each device before this process touched one; empty when it already has."""
    touched = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {} if touched else nvml.used_bytes_by_uuid()
