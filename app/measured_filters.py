"""The sidebar of the page Measured: which rows are looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import streamlit as st

import planner
from app import charts, measurements
from profiles.records import PHASES, SPLITS
from profiles.rows import QUANTITIES, Row

ALL = "all devices"
UNSPLIT = "outside the suites"
SUITES = "The named list of points that a run belongs to: `planner profile --suite`."
SPLIT = "held-out: no constant was fitted on these runs. calibration: some may be."


def device(found: measurements.Store) -> str:
    """The device that is looked at: at first the GPU with the most rows, else all of them."""
    counts: dict[str, int] = {}
    for row in found.rows:
        counts[row.device] = counts.get(row.device, 0) + 1
    others = [name for name in planner.gpus() if name not in counts]
    options = [ALL, *counts, *others]
    most = max((name for name in counts if name != "cpu"), key=counts.__getitem__, default=ALL)
    chosen = st.sidebar.selectbox(
        "Device", options, index=options.index(most), key="device", bind="query-params"
    )
    return str(chosen)


def filtered(found: measurements.Store, rows: Sequence[Row]) -> list[Row]:
    """The rows that the filters leave; a filter that is empty leaves all."""
    runtime_of = {record.id: record.runtime for record in found.records.values()}
    present = {row.quantity for row in rows}
    splits = [name for name in SPLITS if any(row.split == name for row in rows)]
    splits += [UNSPLIT] * any(row.split is None for row in rows)
    suites = _narrow("Suite", _names(row.suite or UNSPLIT for row in rows), "of_suite", SUITES)
    splits = _narrow("Split", splits, "of_split", SPLIT)
    models = _narrow("Model", _names(row.model for row in rows), "of_model")
    quantities = _narrow(
        "Quantity", [charts.label(q) for q in QUANTITIES if q in present], "of_quantity"
    )
    phases = _narrow("Phase", [p for p in PHASES if any(r.phase == p for r in rows)], "in_phase")
    runtimes = _narrow("Runtime", _names(runtime_of[row.record] for row in rows), "in_runtime")
    return [
        row
        for row in rows
        if (row.suite or UNSPLIT) in suites
        and (row.split or UNSPLIT) in splits
        and row.model in models
        and charts.label(row.quantity) in quantities
        and row.phase in phases
        and runtime_of[row.record] in runtimes
    ]


def _names(values: Iterable[str]) -> list[str]:
    return sorted(set(values))


def _narrow(name: str, options: Sequence[str], key: str, help: str | None = None) -> list[str]:
    """Those chosen of the options; all of them where nothing is chosen."""
    chosen = st.sidebar.multiselect(
        name, options, key=key, bind="query-params", placeholder="all", select_all=False, help=help
    )
    return list(chosen) or list(options)
