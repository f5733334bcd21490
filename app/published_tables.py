"""What others measured and published, beside ours: a part of the page Measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import pandas as pd
import streamlit as st

from app import charts, measurements, published_charts
from app.measured_tables import RIGHT, SHARE, SIGNED
from app.published_charts import PublishedAny
from planner.report import csv_text
from profiles.published import EXPLAINED_FROM, PublishedRow, published_summary
from profiles.published_latency import EXPLAINED_FROM as TIME_EXPLAINED_FROM
from profiles.published_latency import LatencyRow, latency_summary

LINK = st.column_config.LinkColumn(display_text=r"github\.com/[^/]+/([^/]+)/")
WIDE = st.column_config.TextColumn(width="large")


def shown() -> None:
    """Times, then memory: errors by source, every error as a point, every row with its source."""
    memory, times = measurements.published()
    st.caption(
        "Figures that other people measured and published with their conditions, each linked to "
        "where it stands at its commit. No constant of the planner was fitted on them; 14 rows of "
        "gpt-fast had been seen before some rules of compiled steps were written."
    )
    with st.container(horizontal=True):
        st.download_button(
            "Download CSV",
            csv_text(pd.DataFrame([asdict(row) for row in (*times, *memory)])),
            file_name="published.csv",
            mime="text/csv",
            on_click="ignore",
            icon=":material/download:",
        )
    st.subheader("Published times")
    st.caption(
        "Engines that are no runtimes of ours are planned as the nearest one, see *planned as*. "
        "Tokens/s are of the whole time; more is faster. A miss above "
        f"{TIME_EXPLAINED_FROM:.0%} has a sentence."
    )
    _errors_of_times(times)
    _figure(times, title="Times")
    _rows(times, ours=[_time(row) for row in times])
    st.subheader("Published memory")
    st.caption(
        "*with*, hollow points: with what the version that ran is known, by its source, to hold "
        f"besides. A miss above {EXPLAINED_FROM:.0%} has a sentence."
    )
    _errors_of_memory(memory)
    _figure(memory, title="Memory")
    _rows(memory, ours=[_memory(row) for row in memory])


def _errors_of_times(rows: Sequence[LatencyRow]) -> None:
    table = pd.DataFrame(
        [
            (
                s.engine,
                charts.label(s.quantity),
                s.n,
                _percent(s.mean_error),
                _percent(s.mean_abs_error),
                _percent(s.worst_abs_error),
                s.unpredicted,
            )
            for s in latency_summary(rows)
        ],
        columns=["engine", "quantity", "n", "mean error", "mean |error|", "worst", "not planned"],
    )
    _summary(table, alt="Errors of published times by engine and quantity")


def _errors_of_memory(rows: Sequence[PublishedRow]) -> None:
    table = pd.DataFrame(
        [
            (
                s.source,
                charts.label(s.quantity),
                s.n,
                *map(_percent, (s.mean_error, s.worst_error, s.mean_named, s.worst_named)),
                s.unpredicted,
            )
            for s in published_summary(rows)
        ],
        columns=["source", "quantity", "n", "mean |error|", "worst", "mean with", "worst with",
                 "not planned"],
    )  # fmt: skip
    _summary(table, alt="Errors of published memory by source and quantity")


def _summary(table: pd.DataFrame, *, alt: str) -> None:
    shares = ("mean |error|", "worst", "mean with", "worst with")
    looks = {"mean error": SIGNED} | {name: SHARE for name in shares if name in table}
    st.dataframe(table, hide_index=True, height="content", column_config=looks, alt=alt)


def _figure(rows: Sequence[PublishedAny], *, title: str) -> None:
    st.markdown(f"**{title}**, every error")
    st.plotly_chart(
        published_charts.errors(rows),
        width="stretch",
        config={"displayModeBar": False},
        alt=published_charts.in_words(rows, title=title),
    )


def _rows(rows: Sequence[PublishedAny], *, ours: Sequence[dict[str, object]]) -> None:
    table = pd.DataFrame(
        [
            {
                "source": row.url,
                "model": row.model,
                "run": row.run,
                "quantity": charts.label(row.quantity),
                "published": charts.value(row.quantity, row.measured),
                "ours": charts.value(row.quantity, row.predicted),
                "error": _percent(row.relative_error),
                **own,
                "GPU": row.gpu,
                "licence": row.licence,
            }
            for row, own in zip(rows, ours, strict=True)
        ]
    )
    st.dataframe(
        table,
        hide_index=True,
        column_config={
            "source": LINK,
            "published": RIGHT,
            "ours": RIGHT,
            "error": SIGNED,
            "with": SIGNED,
            "why": WIDE,
        },
        alt="Every published quantity with its source, our prediction and the signed error",
    )
    with st.expander("Why rows are missed, or not planned"):
        for why, count in Counter(row.why for row in rows if row.why).items():
            st.markdown(f"{count} × {charts.escaped(why)}.")


def _time(row: LatencyRow) -> dict[str, object]:
    return {
        "why": row.why,
        "engine": row.engine,
        "planned as": row.planned_as,
        "bound by": row.bound_by,
    }


def _memory(row: PublishedRow) -> dict[str, object]:
    return {"with": _percent(row.named_error), "why": row.why}


def _percent(fraction: float | None) -> float | None:
    return None if fraction is None else 100 * fraction
