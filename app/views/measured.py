"""Measured: what was seen on real devices, beside what the planner says today."""

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import streamlit as st

import planner
from app import charts, measurements
from planner.report import csv_text
from profiles.compare import Row, summary, to_frame

ALL = "all devices"


def label(device: str) -> str:
    """A device's full name, if the catalogue has it."""
    known = planner.gpus()
    return known[device].label if device in known else device


def nothing(device: str | None) -> None:
    """Say that there is no measurement, and how to make one."""
    place = "" if device is None else f" for {label(device)}"
    st.info(f"No measurements{place} yet.")
    on_cpu = device in (None, "cpu")
    st.markdown("To make one:" if on_cpu else "To make one, on a machine with this device:")
    st.code(
        "planner profile llama-50m --batch 1 --prompt 512 --output 32 "
        f"--device {'cpu' if on_cpu else 'cuda'}",
        language="bash",
        wrap_lines=True,
    )


def problems(found: measurements.Store) -> None:
    """What the loader and the comparison could not use."""
    for problem in found.problems[:3]:
        st.warning(problem)
    if rest := found.problems[3:]:
        with st.expander(f"{len(rest)} more problems"):
            st.code("\n".join(rest), language=None, wrap_lines=True)


def narrow(name: str, options: Sequence[str], key: str) -> list[str]:
    """Those chosen of the options; all of them where nothing is chosen."""
    chosen = st.multiselect(
        name, options, key=key, bind="query-params", placeholder="all", select_all=False
    )
    return list(chosen) or list(options)


def filtered(found: measurements.Store, device: str) -> list[Row]:
    """The rows that the filters leave."""
    rows = [row for row in found.rows if device in (ALL, row.device)]
    runtime_of = {record.id: record.runtime for record in found.records.values()}
    models = sorted({row.model for row in rows})
    runtimes = sorted({runtime_of[row.record] for row in rows})
    phases = [phase for phase in charts.PHASES if any(row.phase == phase for row in rows)]
    for column, options in zip(
        st.columns(3),
        (
            ("Model", models, "of_model"),
            ("Runtime", runtimes, "in_runtime"),
            ("Phase", phases, "in_phase"),
        ),
        strict=True,
    ):
        with column:
            kept = narrow(*options)
        if options[0] == "Model":
            models = kept
        elif options[0] == "Runtime":
            runtimes = kept
        else:
            phases = kept
    return [
        row
        for row in rows
        if row.model in models and runtime_of[row.record] in runtimes and row.phase in phases
    ]


def per_quantity(rows: Sequence[Row]) -> None:
    """Mean, p90 and worst error of each quantity."""
    st.subheader("How far off")
    table = pd.DataFrame(
        [
            (
                charts.label(s.quantity),
                s.split or "none",
                s.n,
                *(
                    None if e is None else 100 * e
                    for e in (s.mean_abs_error, s.p90_abs_error, s.worst_abs_error)
                ),
                s.unpredicted,
            )
            for s in summary(rows)
        ],
        columns=["quantity", "split", "n", "mean |error|", "p90", "worst", "not predicted"],
    )
    share = st.column_config.NumberColumn(format="%.2f %%")
    st.dataframe(
        table,
        hide_index=True,
        column_config={"mean |error|": share, "p90": share, "worst": share},
        alt="Error of each quantity: how many, mean, 90th percentile and worst",
    )


def drawn(rows: Sequence[Row]) -> None:
    """Every error as a point, and predicted against measured; bytes and times apart."""
    units = [
        (unit, title, members)
        for unit, title in (("bytes", "Memory"), ("s", "Time"))
        if (members := [r for r in rows if r.quantity.endswith(f"_{unit}") and r.predicted])
    ]
    if not units:
        return
    for column, (_, title, members) in zip(st.columns(len(units)), units, strict=True):
        with column:
            st.markdown(f"**{title}**, every error")
            chart(charts.errors(members), f"{title}: signed relative error of each measurement")
    st.subheader("Predicted against measured")
    for column, (unit, title, members) in zip(st.columns(len(units)), units, strict=True):
        with column:
            st.markdown(f"**{title}**: equal on the dashed line")
            chart(
                charts.parity(members, unit=unit),
                f"{title}: predicted against measured on logarithmic axes",
            )


def chart(figure: object, words: str) -> None:
    """A figure as all of them are shown here."""
    st.plotly_chart(figure, width="stretch", config={"displayModeBar": False}, alt=words)


def every_row(found: measurements.Store, rows: Sequence[Row]) -> None:
    """The rows as a table and as a file."""
    rows = with_traces(rows)
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
    right = st.column_config.TextColumn(alignment="right")
    st.dataframe(
        pd.DataFrame(
            lines,
            columns=[
                "device", "model", "runtime", "attention", "dtype", "phase",
                "batch × (prompt + output)", "quantity", "predicted", "traced", "measured",
                "error", "record", "measured on",
            ],
        ),
        hide_index=True,
        column_order=[
            "model", "phase", "quantity", "predicted", *["traced"] * beside, "measured",
            "error", "device", "runtime", "attention", "dtype", "batch × (prompt + output)",
            "record", "measured on",
        ],
        column_config={
            "predicted": right,
            "traced": right,
            "measured": right,
            "error": st.column_config.NumberColumn(format="%+.2f %%"),
        },
        alt="Every measured quantity with its prediction and the signed error",
    )  # fmt: skip


def with_traces(rows: Sequence[Row]) -> Sequence[Row]:
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


def unmeasured(found: measurements.Store) -> None:
    """The devices of the catalogue that no record is of."""
    seen = {record.environment.gpu for record in found.records.values()}
    missing = [gpu.label for name, gpu in planner.gpus().items() if name not in seen]
    if missing:
        st.caption(f"No record of these devices yet: {', '.join(missing)}.")


st.header("Measured")
st.caption("What real runs held and took, beside what the planner predicts for them today.")
try:
    stored = measurements.store()
except planner.ConfigError as error:
    st.error(str(error))
    st.stop()

problems(stored)
seen = list(dict.fromkeys(row.device for row in stored.rows))
others = [name for name in planner.gpus() if name not in seen]
device = str(st.selectbox("Device", [ALL, *seen, *others], key="device", bind="query-params"))
of_device = [row for row in stored.rows if device in (ALL, row.device)]
if not of_device:
    nothing(None if device == ALL else device)
else:
    shown = filtered(stored, device)
    if shown:
        per_quantity(shown)
        drawn(shown)
        every_row(stored, shown)
    else:
        st.info("The filters leave no measurement.")
unmeasured(stored)
