"""What a point was and what was seen of it, put together as its record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from planner import CacheSpec, Model
from profiles import environment, records
from profiles.points import Point, TrainingPoint, cache_fields, kept_dtype
from profiles.records import Environment, Record
from profiles.workloads import RUNTIMES

SIZES = ("batch", "sequence_tokens")
"""Fields of a Training that a record has as its own."""
FOUND = ("routing",)
"""Those that a run finds and does not set: its routers pick as they do."""


def record_of(
    model: Model,
    run: Point | TrainingPoint,
    *,
    runtime: str,
    attention: str | None,
    dtype: str,
    status: str,
    seen: Mapping[str, Any],
    env: Environment,
    kv_dtype: str | None = None,
    cache: CacheSpec | None = None,
    **place: str | None,
) -> Record:
    """A record of this moment. `seen` are its fields as far as they were measured, and the clocks.

    `attention`: what was asked for, where `seen` has not what ran. `kv_dtype` and `cache` as of a
    Deployment. `place`: suite, split and point.
    """
    values = {"attention": attention, **_work(run), **seen}
    clocks = values.pop("clocks", {})
    return records.create(
        status=status,
        model=model.name,
        config=model.config,
        runtime=runtime,
        runtime_version=environment.installed(RUNTIMES[runtime].distribution),
        dtype=dtype,
        kv_dtype=kept_dtype(dtype, kv_dtype, cache),
        cache=cache_fields(cache),
        mode=run.mode if isinstance(run, Point) else "eager",
        environment=replace(env, **clocks),
        **values,
        **place,
    )


def _work(run: Point | TrainingPoint) -> dict[str, Any]:
    if isinstance(run, Point):
        return {
            "phase": run.phase,
            "batch": run.batch,
            "prompt_tokens": run.prompt_tokens,
            "output_tokens": run.output_tokens,
            "context_tokens": None if run.phase == "prefill" else run.context_tokens,
            "logits": run.logits,
            "padded": run.padded,
        }
    work = run.work
    step = json.loads(json.dumps(asdict(work)))  # as it will be read again: lists, no tuples
    beside: dict[str, Any] = {"dropout": 0.0}
    if run.weight_dtype is not None:
        beside["weight_dtype"] = run.weight_dtype
    return {
        "phase": "training",
        "batch": work.batch,
        "prompt_tokens": work.sequence_tokens,
        "output_tokens": 1,
        "logits": "all",
        "step": {k: v for k, v in step.items() if k not in SIZES + FOUND} | beside,
    }
