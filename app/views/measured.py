"""Measured: what was seen on real devices, beside what the planner says today."""

from collections.abc import Iterable, Sequence
from typing import Any

import streamlit as st

import planner
from app import (
    measured_charts,
    measured_filters,
    measured_headline,
    measured_tables,
    measurements,
    one_run,
    published_tables,
)
from profiles.rows import Row

OURS, PUBLISHED = "Our runs", "Published by others"
GROUPS = {"quantity": None, "model": "model", "phase": "phase", "suite": "suite"}


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
    """What the loader and the comparison could not use: one line, or one line and a list."""
    if len(found.problems) == 1:
        st.warning(found.problems[0])
    elif found.problems:
        with st.expander(f"{len(found.problems)} records or lines are not compared"):
            st.code("\n".join(found.problems), language=None, wrap_lines=True)


def how_far_off(found: measurements.Store, rows: Sequence[Row]) -> None:
    """Repeatability first, then the errors in a few numbers and each of them as a point."""
    st.subheader("How far off")
    measured_tables.repeatable(found, rows)
    asked = st.segmented_control(
        "Grouped by", list(GROUPS), default="quantity", key="by", bind="query-params"
    )
    measured_tables.errors(rows, by=GROUPS[asked or "quantity"])
    st.caption(
        "Filled points: held-out. Hollow: calibration, constants may be fitted on them. Hollow "
        "with a dot: outside the suites."
    )
    lines = "model" if asked == "model" else "quantity"
    for column, (_, title, members) in beside(rows):
        with column:
            st.markdown(f"**{title}**, every error")
            chart(
                measured_charts.residuals(members, by=lines),
                measured_charts.residuals_in_words(members, title=title),
            )
    if len({row.model for row in rows}) > 1 and any(r.relative_error is not None for r in rows):
        st.markdown("**Mean error in %** of each model: blue is predicted too little, red too much")
        chart(measured_charts.heat_map(rows), measured_charts.heat_map_in_words(rows))


def against(rows: Sequence[Row]) -> None:
    """Predicted against measured; bytes and times apart."""
    if not any(row.predicted for row in rows):
        return
    st.subheader("Predicted against measured")
    for column, (unit, title, members) in beside(rows):
        with column:
            st.markdown(f"**{title}**: equal on the dashed line")
            chart(
                measured_charts.parity(members, unit=unit),
                f"{title}: {len(members)} values predicted against measured on logarithmic axes",
            )


def beside(rows: Sequence[Row]) -> Iterable[tuple[Any, tuple[str, str, list[Row]]]]:
    """A column for memory and one for time, whichever there is."""
    units = [
        (unit, title, members)
        for unit, title in (("bytes", "Memory"), ("s", "Time"))
        if (members := [r for r in rows if r.quantity.endswith(f"_{unit}") and r.predicted])
    ]
    return zip(st.columns(len(units)), units, strict=True) if units else ()


def chart(figure: object, words: str) -> None:
    """A figure as all of them are shown here."""
    st.plotly_chart(figure, width="stretch", config={"displayModeBar": False}, alt=words)


def unmeasured(found: measurements.Store) -> None:
    """The devices of the catalogue that no record is of."""
    seen = {record.environment.gpu for record in found.records.values()}
    missing = [gpu.label for name, gpu in planner.gpus().items() if name not in seen]
    if missing:
        with st.expander(f"{len(missing)} devices of the catalogue were not measured yet"):
            st.caption(f"{', '.join(missing)}.")


def ours() -> None:
    """Our own records: filters, errors, one run opened, every row."""
    try:
        stored = measurements.store()
    except planner.ConfigError as error:
        st.error(str(error))
        st.stop()
    device = measured_filters.device(stored)
    of_device = [row for row in stored.rows if device in (measured_filters.ALL, row.device)]
    if not of_device:
        nothing(None if device == measured_filters.ALL else device)
    else:
        shown = measured_filters.filtered(stored, of_device)
        if shown:
            if stored.hint and any(row.device == "cpu" for row in shown):
                st.info(f"{stored.hint}.")
            measured_headline.cards(shown)
            by_link = st.query_params.get("show") == "run"  # from Plan: what was asked comes first
            if by_link:
                one_run.opened(stored, shown)
            how_far_off(stored, shown)
            against(shown)
            if not by_link:
                one_run.opened(stored, shown)
            measured_tables.others(stored, shown)
            measured_tables.beside_peers(stored, shown)
            measured_tables.every_row(stored, shown)
        else:
            st.info("The filters leave no measurement.")
    problems(stored)
    unmeasured(stored)


st.header("Measured")
st.caption("What real runs held and took, beside what the planner predicts for them today.")
whose = st.segmented_control(
    "Whose measurements",
    [OURS, PUBLISHED],
    default=OURS,
    key="whose",
    bind="query-params",
    label_visibility="collapsed",
)
if whose == PUBLISHED:
    try:
        published_tables.shown()
    except planner.ConfigError as error:
        st.error(str(error))
else:
    ours()
