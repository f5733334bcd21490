"""The stored records for the pages: read once until a file changes, and searched for neighbours."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

import planner
from planner.timing.calibration_files import Stamp, own_stamp
from profiles import records
from profiles.compare import Row, compare
from profiles.published import PublishedRow, published_rows
from profiles.published_latency import LatencyRow, latency_rows
from profiles.record_cpu import untimed
from profiles.records import Record


@dataclass(frozen=True, kw_only=True, slots=True)
class Store:
    """All records, their comparison with today's planner, and what could not be used.

    `hint`: what would time CPUs that records are of; None where all are timed.
    """

    records: dict[str, Record]
    rows: tuple[Row, ...]
    problems: tuple[str, ...]
    hint: str | None = None


def store() -> Store:
    """What is stored now; ConfigError for a file that only a newer version can read."""
    return _read(tuple(_stamp(path) for path in records.default_paths()), own_stamp("cpu"))


@st.cache_data(show_spinner="Running the modules on fake tensors …", max_entries=8)
def traced(ids: tuple[str, ...]) -> tuple[dict[tuple[str, str], float], tuple[str, ...]]:
    """What each (record, quantity) is on fake tensors, and what could not be traced."""
    known, problems = store().records, list[str]()
    rows = compare([known[name] for name in ids], traced=True, on_problem=problems.append)
    found = {(row.record, row.quantity): row.traced for row in rows}
    return {key: value for key, value in found.items() if value is not None}, tuple(problems)


@st.cache_data(show_spinner="Planning what others published …", max_entries=1)
def published() -> tuple[list[PublishedRow], list[LatencyRow]]:
    """What others measured, memory and times, beside what is planned for it."""
    return published_rows(), latency_rows()


def nearest(
    found: Store,
    model: planner.Model,
    work: planner.Inference | planner.Training,
    deploy: planner.Deployment,
) -> Record | None:
    """The record of this device and runtime that is most like the plan; None if there is none.

    The same model comes before others, of training steps then those made in the same way; then the
    sizes decide, compared as ratios.
    """
    trains = isinstance(work, planner.Training)
    compared = {row.record for row in found.rows}
    candidates = [
        record
        for record in found.records.values()
        if record.id in compared
        and record.environment.gpu == deploy.gpu
        and record.runtime == deploy.runtime
        and (record.phase == "training") == trains
    ]

    def distance(record: Record) -> tuple[bool, bool, float, bool]:
        sizes = [(record.batch, work.batch)]
        other_way = False
        if isinstance(work, planner.Training):
            sizes.append((record.prompt_tokens, work.sequence_tokens))
            step = record.step or {}
            asked = (work.method, work.checkpointing, work.optimizer)
            other_way = asked != tuple(map(step.get, ("method", "checkpointing", "optimizer")))
        else:
            sizes.append((record.prompt_tokens, work.prompt_tokens))
            sizes.append((record.output_tokens, work.output_tokens))
        apart = sum(abs(math.log(ours / plan)) for ours, plan in sizes)
        return record.model != model.name, other_way, apart, record.phase != "generation"

    return min(candidates, key=distance, default=None)


def workload(record: Record) -> str:
    """Batch × (prompt + output) of a record; of a training step, batch × tokens."""
    if record.phase == "training":
        return f"{record.batch:,} × {record.prompt_tokens:,}"
    return f"{record.batch:,} × ({record.prompt_tokens:,} + {record.output_tokens:,})"


def _stamp(path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError:  # gone since it was listed: the loader says so
        return str(path), 0, 0
    return str(path), status.st_mtime_ns, status.st_size


@st.cache_data(show_spinner=False, max_entries=8)
def _read(stamps: tuple[tuple[str, int, int], ...], calibration: Stamp) -> Store:
    found, problems = records.load([path for path, _, _ in stamps])
    tell: Callable[[str], None] = problems.append
    rows = compare(found, on_problem=tell)
    return Store(
        records={r.id: r for r in found},
        rows=tuple(rows),
        problems=tuple(problems),
        hint=untimed(found),
    )
