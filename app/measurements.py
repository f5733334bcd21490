"""The stored records for the pages: read once until a file changes, and searched for neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import streamlit as st

import planner
from planner.timing.calibration_files import Stamp, own_stamp
from profiles import records
from profiles.compare import Row, compare
from profiles.points import kept_dtype
from profiles.published import PublishedRow, published_rows
from profiles.published_latency import LatencyRow, latency_rows
from profiles.record_cpu import untimed
from profiles.records import Record

Stamps: TypeAlias = tuple[tuple[str, int, int], ...]
"""Path, time of change and size of each record file."""

PREDICTING = "Predicting every measured run with today's planner …"


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
    stamps = _stamps(), own_stamp("cpu")
    by_id, problems = _loaded(stamps[0])
    rows, problems = list[Row](), list(problems)
    bar = st.progress(0.0, PREDICTING) if stamps not in _seen() else None
    for done, record in enumerate(by_id.values(), start=1):
        found, told = _compared(record.id, stamps, record)
        rows += found
        problems += told
        if bar is not None:
            bar.progress(done / len(by_id), PREDICTING)
    if bar is not None:
        bar.empty()
        _seen().add(stamps)
    return Store(
        records=by_id,
        rows=tuple(rows),
        problems=tuple(problems),
        hint=untimed(list(by_id.values())),
    )


def loaded() -> dict[str, Record]:
    """The records alone, by their ids: nothing is compared."""
    return _loaded(_stamps())[0]


def rows_of(record: Record) -> tuple[Row, ...]:
    """One record beside what the planner predicts for it."""
    return _compared(record.id, (_stamps(), own_stamp("cpu")), record)[0]


@st.cache_data(show_spinner="Running the modules on fake tensors …", max_entries=8)
def traced(ids: tuple[str, ...]) -> tuple[dict[tuple[str, str], float], tuple[str, ...]]:
    """What each (record, quantity) is on fake tensors, and what could not be traced."""
    known, problems = loaded(), list[str]()
    rows = compare([known[name] for name in ids], traced=True, on_problem=problems.append)
    found = {(row.record, row.quantity): row.traced for row in rows}
    return {key: value for key, value in found.items() if value is not None}, tuple(problems)


@st.cache_data(show_spinner="Planning what others published …", max_entries=1)
def published() -> tuple[list[PublishedRow], list[LatencyRow]]:
    """What others measured, memory and times, beside what is planned for it."""
    return published_rows(), latency_rows()


def nearest(
    found: Mapping[str, Record],
    model: planner.Model,
    work: planner.Inference | planner.Training,
    deploy: planner.Deployment,
) -> Record | None:
    """The record of this device and runtime that is most like the plan; None if there is none.

    The same model comes before others, then those made in the same way, over the same cache; then
    the sizes decide, compared as ratios. Of runs of the same sizes one that generated, its steps
    launched as the plan's are, its memory seen, its host's speed read.
    """
    trains = isinstance(work, planner.Training)
    candidates = [
        record
        for record in found.values()
        if record.status == "ok"
        and record.environment.gpu == deploy.gpu
        and record.runtime == deploy.runtime
        and (record.phase == "training") == trains
    ]

    def distance(record: Record) -> tuple[bool, bool, float, tuple[bool, ...]]:
        sizes = [(record.batch, work.batch)]
        if isinstance(work, planner.Training):
            sizes.append((record.prompt_tokens, work.sequence_tokens))
            step = record.step or {}
            asked = (work.method, work.checkpointing, work.optimizer)
            other_way = asked != tuple(map(step.get, ("method", "checkpointing", "optimizer")))
        else:
            dtype = deploy.dtype or model.dtype
            kv_dtype = kept_dtype(dtype, deploy.kv_dtype, deploy.cache)
            kind = None if deploy.cache is None else deploy.cache.kind
            theirs = (record.cache or {}).get("kind")
            other_way = (kv_dtype != dtype and kv_dtype, kind, work.padded) != (
                record.kv_dtype != record.dtype and record.kv_dtype,
                theirs,
                record.padded,
            )
            sizes.append((record.prompt_tokens, work.prompt_tokens))
            sizes.append((record.output_tokens, work.output_tokens))
        apart = sum(abs(math.log(ours / plan)) for ours, plan in sizes)
        less_told = (
            record.phase != "generation",
            (record.mode == "eager") != (deploy.mode == "eager"),
            record.peak_live_bytes is None,
            not record.host_add_s,
        )
        return record.model != model.name, other_way, apart, less_told

    return min(candidates, key=distance, default=None)


def workload(record: Record) -> str:
    """Batch × (prompt + output) of a record; of a training step, batch × tokens."""
    if record.phase == "training":
        return f"{record.batch:,} × {record.prompt_tokens:,}"
    return f"{record.batch:,} × ({record.prompt_tokens:,} + {record.output_tokens:,})"


def _stamps() -> Stamps:
    return tuple(_stamp(path) for path in records.default_paths())


def _stamp(path: Path) -> tuple[str, int, int]:
    try:
        status = path.stat()
    except OSError:  # gone since it was listed: the loader says so
        return str(path), 0, 0
    return str(path), status.st_mtime_ns, status.st_size


@st.cache_data(show_spinner=False, max_entries=8)
def _loaded(stamps: Stamps) -> tuple[dict[str, Record], list[str]]:
    found, problems = records.load([path for path, _, _ in stamps])
    return {record.id: record for record in found}, problems


@st.cache_resource(show_spinner=False)
def _seen() -> set[tuple[Stamps, Stamp]]:
    """The files whose records were all compared: what comes from the cache needs no bar."""
    return set()


@st.cache_data(show_spinner=False, max_entries=4096)
def _compared(
    id: str, stamps: tuple[Stamps, Stamp], _record: Record
) -> tuple[tuple[Row, ...], tuple[str, ...]]:
    problems: list[str] = []
    return tuple(compare([_record], on_problem=problems.append)), tuple(problems)
