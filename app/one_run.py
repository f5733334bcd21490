"""One measured run, opened: its parts, and the device's memory under the predicted levels."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import streamlit as st

import planner
from app import charts, measurements, run_charts
from planner.format import gib
from profiles.compare import estimate_of
from profiles.points import kept_words
from profiles.records import Record
from profiles.rows import Row
from profiles.sampler import Series, cost_line

SIGNED = st.column_config.NumberColumn(format="%+.2f %%")
RIGHT = st.column_config.TextColumn(alignment="right")


def opened(found: measurements.Store, rows: Sequence[Row]) -> None:
    """A run is chosen among those of the rows; those with a series come first."""
    st.subheader("One run")
    names = list(dict.fromkeys(row.record for row in rows))
    names.sort(key=lambda name: found.records[name].series is None)
    asked = st.query_params.get("run")
    if "run" not in st.session_state and asked in names:  # the link has the id, the list a title
        st.session_state["run"] = asked
    chosen = st.selectbox(
        "Run",
        names,
        key="run",
        format_func=lambda name: title(found.records[name]),
        help="Those with a time series of the device's memory first.",
    )
    if asked is not None or chosen != names[0]:
        st.query_params["run"] = chosen
    record = found.records[chosen]
    parts = [row for row in found.rows if row.record == record.id]
    st.caption(about(record))
    left, right = st.columns(2, gap="medium")
    with left:
        _chart(run_charts.components(parts), run_charts.components_in_words(parts))
        st.caption("Bars: measured. Upright lines: predicted.")
    with right:
        _table(parts)
    over_time(record)


def title(record: Record) -> str:
    """A run's name in the list."""
    series = " · with a time series" if record.series is not None else ""
    kept = f" · {words}" if (words := kept_words(record)) else ""
    work = f"{record.phase} {measurements.workload(record)}"
    return f"{record.model} · {work} · {record.runtime}{kept}{series} · {record.id}"


def about(record: Record) -> str:
    """What ran on what, and when."""
    environment = record.environment
    parts = [
        f"batch × {'tokens' if record.phase == 'training' else '(prompt + output)'}: "
        f"{measurements.workload(record)}",
        f"{record.runtime} {record.runtime_version or ''}".strip(),
        f"{record.attention or 'default'} attention",
        record.dtype,
        *([kept] if (kept := kept_words(record)) else []),
        environment.device_name,
        f"torch {environment.torch}",
        f"measured on {record.created_utc[:10]}",
        *([f"suite {record.suite}"] if record.suite else []),
        *([record.split] if record.split else []),
        *([f"peak at {record.peak_op}"] if record.peak_op else []),
    ]
    return " · ".join(parts)


def over_time(record: Record) -> None:
    """The device's memory while the run went on, if that was kept."""
    if record.series is None:
        st.caption("No time series of the device's memory was kept of this run.")
        return
    try:
        seen = Series.from_json_dict(dict(record.series))
    except planner.ConfigError as error:
        st.warning(f"record {record.id}: {error}")
        return
    try:
        predicted = run_charts.levels(
            estimate_of(record), others_bytes=record.device_used_before_bytes or 0
        )
    except planner.ConfigError:
        predicted = []
    st.markdown("**While it ran**: the memory that NVML saw, and dashed what is predicted")
    near = st.toggle("Close to the peak", key="near_peak", bind="query-params")
    _chart(
        run_charts.series(seen, predicted, near_peak=near),
        run_charts.series_in_words(seen, predicted),
    )
    reserve = record.device_reserve_bytes
    st.caption(
        "NVML counts the device's context and whole segments; of the levels only the last has both."
        + (f" The driver's own reserve of {gib(reserve)} is in neither." if reserve else "")
        + f" {cost_line(seen)}."
    )


def _table(rows: Sequence[Row]) -> None:
    st.dataframe(
        pd.DataFrame(
            [
                (
                    charts.label(row.quantity),
                    charts.value(row.quantity, row.predicted),
                    charts.value(row.quantity, row.measured),
                    None if row.relative_error is None else 100 * row.relative_error,
                )
                for row in rows
            ],
            columns=["component", "predicted", "measured", "error"],
        ),
        hide_index=True,
        column_config={"predicted": RIGHT, "measured": RIGHT, "error": SIGNED},
        alt="The components of this run, predicted and measured",
    )


def _chart(figure: object, words: str) -> None:
    st.plotly_chart(figure, width="stretch", config={"displayModeBar": False}, alt=words)
