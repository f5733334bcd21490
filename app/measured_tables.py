"""The tables of the page Measured: how far off, what others would have said, every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import streamlit as st

from app import charts, measurements
from planner.report import csv_text
from profiles import peers
from profiles.baselines import baseline_summary, baselines
from profiles.repeatability import repeatability, repeats
from profiles.rows import Row, to_frame
from profiles.summaries import summary

SHARE = st.column_config.NumberColumn(format="%.2f %%")
SIGNED = st.column_config.NumberColumn(format="%+.2f %%")
MILLISECONDS = st.column_config.NumberColumn(format="%.1f")
ERRORS = {
    "split": st.column_config.TextColumn(
        help="held-out: no constant was fitted on these runs. calibration: some may be."
    ),
    "n": st.column_config.NumberColumn(help="Runs that were measured and are predicted."),
    "mean error": st.column_config.NumberColumn(
        format="%+.2f %%", help="predicted / measured − 1: above zero is predicted too much."
    ),
    "mean |error|": st.column_config.NumberColumn(format="%.2f %%", help="The sign left out."),
    "p90": st.column_config.NumberColumn(format="%.2f %%", help="Nine in ten are within."),
    "worst": SHARE,
    "worst run": st.column_config.LinkColumn(display_text=r"run=(\w+)", help="Opens it."),
    "not predicted": st.column_config.NumberColumn(
        help="Measured, but of a configuration that the planner refuses today."
    ),
}
RIGHT = st.column_config.TextColumn(alignment="right")


def repeatable(found: measurements.Store, rows: Sequence[Row]) -> None:
    """How far two measurements of one point are apart: no prediction can be nearer than that."""
    ids, quantities = {row.record for row in rows}, {row.quantity for row in rows}
    spreads = [
        spread
        for spread in repeatability(repeats(found.records[name] for name in ids))
        if spread.quantity in quantities
    ]
    if not any(spread.between == "runs" for spread in spreads):
        st.caption("No point here was measured by two runs yet.")
    if not spreads:
        return
    with st.expander("Repeatability: the same point measured again"):
        st.caption(
            "(largest − smallest) / median. Between runs: of other processes; between passes: of "
            "one run."
        )
        st.dataframe(
            pd.DataFrame(
                [
                    (s.device, s.between, charts.label(s.quantity), s.points,
                     100 * s.mean_spread, 100 * s.worst_spread)
                    for s in spreads
                ],
                columns=["device", "between", "quantity", "points", "mean spread", "worst spread"],
            ),
            hide_index=True,
            column_config={"mean spread": SHARE, "worst spread": SHARE},
            alt="Spread of repeated measurements by device and quantity",
        )  # fmt: skip


def errors(rows: Sequence[Row], *, by: str | None) -> None:
    """Bias, mean, p90 and worst error of each quantity and split, of all rows or by group."""
    of = {row.record: row.device for row in rows}
    table = pd.DataFrame(
        [
            (
                s.group or "none",
                charts.label(s.quantity),
                s.split or "none",
                s.n,
                *(
                    None if e is None else 100 * e
                    for e in (s.mean_error, s.mean_abs_error, s.p90_abs_error, s.worst_abs_error)
                ),
                _link(s.worst_record, of),
                s.unpredicted,
            )
            for s in summary(rows, by=by)
        ],
        columns=[
            by or "group", "quantity", "split", "n", "mean error", "mean |error|", "p90", "worst",
            "worst run", "not predicted",
        ],
    )  # fmt: skip
    if by is None:
        table = table.drop(columns="group")
    if not table["not predicted"].any():
        table = table.drop(columns="not predicted")
    st.dataframe(
        table,
        hide_index=True,
        height="content" if len(table) <= 24 else "auto",
        column_config=ERRORS,
        alt="Error of each quantity: how many, mean, 90th percentile and worst",
    )


def _link(record: str | None, devices: Mapping[str, str]) -> str:
    """Where a run is opened; nothing where none is worst."""
    return f"measured?device={devices[record]}&run={record}&show=run" if record else ""


def others(found: measurements.Store, rows: Sequence[Row]) -> None:
    """What simpler rules and other tools say of the same rows, beside our own error."""
    summaries = baseline_summary(baselines(found.records.values(), rows))
    if not summaries:
        return
    st.subheader("Other ways to tell")
    st.caption(
        "Mean and worst |error| on the same rows. weights-only: two bytes a parameter in 16 bits; "
        "naive-roofline: FLOPs over peak or bytes over bandwidth, a pass as a whole; the names: "
        "what these tools print for Llama-3.1-8B on an H200, for serving engines."
    )
    table = pd.DataFrame(
        [
            (
                s.device,
                charts.label(s.quantity),
                s.split or "none",
                s.method,
                s.n,
                *(
                    100 * e
                    for e in (
                        s.mean_abs_error,
                        s.planner_mean_abs_error,
                        s.worst_abs_error,
                        s.planner_worst_abs_error,
                    )
                ),
            )
            for s in summaries
        ],
        columns=["device", "quantity", "split", "method", "n", "mean", "our mean", "worst",
                 "our worst"],
    )  # fmt: skip
    if table["device"].nunique() == 1:
        table = table.drop(columns="device")
    st.dataframe(
        table,
        hide_index=True,
        column_config=dict.fromkeys(("mean", "our mean", "worst", "our worst"), SHARE),
        alt="Absolute error of other methods beside ours",
    )


def beside_peers(found: measurements.Store, rows: Sequence[Row]) -> None:
    """Where the peers' GPU is shown: what they say of their sizes, what we say, what was seen."""
    if not any(row.device == peers.GPU for row in rows):
        return
    known = peers.peer_rows(found.records.values())
    st.subheader("Llama-3.1-8B on an H200, as others see it")
    st.caption(
        "bf16. The names: what these tools print, for serving engines. Ours: vLLM with CUDA "
        "graphs. Measured: whichever runtime ran; one that launches op by op waits for its host in "
        "decode."
    )
    for quantity, title in (("ttft_s", "TTFT in ms"), ("tpot_s", "TPOT in ms")):
        st.markdown(f"**{title}**")
        table = pd.DataFrame(
            [
                {
                    "batch × prompt": f"{row.batch} × {row.prompt_tokens:,}",
                    "measured": ", ".join(
                        f"{1e3 * s:.1f} ({where})" for where, s in row.measured_s.items()
                    ),
                    "ours": 1e3 * row.planner_s,
                    **{name: 1e3 * s for name, s in row.peers_s.items()},
                }
                for row in known
                if row.quantity == quantity
            ]
        )
        numbers = [name for name in table if name not in ("batch × prompt", "measured")]
        st.dataframe(
            table,
            hide_index=True,
            column_config=dict.fromkeys(numbers, MILLISECONDS),
            alt=f"{title} of Llama-3.1-8B on an H200 by each tool and size",
        )


def every_row(found: measurements.Store, rows: Sequence[Row]) -> None:
    """The rows as a table and as a file."""
    rows = _with_traces(rows)
    beside = any(row.traced is not None for row in rows)
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.subheader("Every measurement")
        st.download_button(
            "Download CSV",
            csv_text(to_frame(rows)),
            file_name="measured.csv",
            mime="text/csv",
            on_click="ignore",
            icon=":material/download:",
        )
    lines = []
    for row in rows:
        record = found.records[row.record]
        lines.append(
            (
                row.device,
                row.model,
                record.runtime,
                record.attention,
                record.dtype,
                row.phase,
                row.suite,
                row.split,
                measurements.workload(record),
                charts.label(row.quantity),
                charts.value(row.quantity, row.predicted),
                charts.value(row.quantity, row.traced),
                charts.value(row.quantity, row.measured),
                None if row.relative_error is None else 100 * row.relative_error,
                row.record,
                record.created_utc[:10],
            )
        )
    st.dataframe(
        pd.DataFrame(
            lines,
            columns=[
                "device", "model", "runtime", "attention", "dtype", "phase", "suite", "split",
                "batch × (prompt + output)", "quantity", "predicted", "traced", "measured",
                "error", "record", "measured on",
            ],
        ),
        hide_index=True,
        column_order=[
            "model", "phase", "quantity", "predicted", *["traced"] * beside, "measured",
            "error", "split", "batch × (prompt + output)", "device", "runtime", "attention",
            "dtype", "suite", "record", "measured on",
        ],
        column_config={"predicted": RIGHT, "traced": RIGHT, "measured": RIGHT, "error": SIGNED},
        alt="Every measured quantity with its prediction and the signed error",
    )  # fmt: skip


def _with_traces(rows: Sequence[Row]) -> Sequence[Row]:
    """The rows, with what the same modules hold on fake tensors if that is asked for."""
    asked = st.toggle(
        "Traced beside them",
        key="traced",
        bind="query-params",
        help="Runs every module on fake tensors, without the device: a second or so each.",
    )
    if not asked:
        return rows
    traced, problems = measurements.traced(tuple(dict.fromkeys(row.record for row in rows)))
    for problem in problems[:3]:
        st.warning(problem)
    return [replace(row, traced=traced.get((row.record, row.quantity))) for row in rows]
