"""Can this number be trusted? The nearest measurement of a plan, and how far off it was."""

from __future__ import annotations

import streamlit as st

import planner
from app import charts, measurements
from planner.format import percent
from profiles.points import kept_words
from profiles.records import Record
from profiles.rows import Row

NOTHING = 1e-4
"""A share that is shown as none."""


def line(
    model: planner.Model,
    work: planner.Inference | planner.Training,
    deploy: planner.Deployment,
) -> None:
    """The errors of the nearest measurement with a way to it, or that there is none."""
    gpu = planner.gpu_named(deploy.gpu)
    try:
        found = measurements.loaded()
    except planner.ConfigError as error:
        st.caption(f"Measurements cannot be read: {error}")
        return
    record = measurements.nearest(found, model, work, deploy)
    if record is None:
        elsewhere = any(r.environment.gpu == gpu.name for r in found.values())
        where = f"in {deploy.runtime} on {gpu.label}" if elsewhere else f"on {gpu.label}"
        what = "no training step" if isinstance(work, planner.Training) else "nothing"
        st.caption(f"Predicted, not measured: {what} was measured {where} yet.")
        return
    rows = measurements.rows_of(record)
    st.caption(
        f"Nearest measured run: {in_words(record)} on {gpu.label}. Off by: "
        f"{', '.join(errors(rows)) or 'not predicted'}."
    )
    st.page_link(
        "views/measured.py",
        label="Open that run",
        icon=":material/monitoring:",
        help="Opens this run on the page Measured, with all others of the device.",
        query_params={"device": gpu.name, "run": record.id, "show": "run"},
    )


def errors(rows: tuple[Row, ...]) -> list[str]:
    """Signed errors in words; those of memory that do not show in two digits are one phrase."""
    known = [(row.quantity, row.relative_error) for row in rows if row.relative_error is not None]
    memory = [(q, e) for q, e in known if q.endswith("_bytes")]
    said = []
    if small := [abs(e) for _, e in memory if abs(e) < NOTHING]:
        every = "memory" if len(small) == len(memory) else "the other memory"
        said = [f"{every} {'to the byte' if not max(small) else 'within 0.01 %'}"]
    large = [(q, e) for q, e in memory if abs(e) >= NOTHING]
    times = [(q, e) for q, e in known if not q.endswith("_bytes")]
    return (
        [f"{charts.label(q)} {percent(e)}" for q, e in large]
        + said
        + [f"{charts.label(q)} {percent(e)}" for q, e in times]
    )


def in_words(record: Record) -> str:
    """Which run it is."""
    work = measurements.workload(record)
    words = (record.model, record.dtype, kept_words(record), work, record.phase)
    return f"{', '.join(filter(None, words))}, {record.runtime} {record.mode}"
