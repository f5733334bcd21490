"""The head of the page Measured: how far off, in a card for each quantity that people ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import streamlit as st

from app import charts
from profiles.rows import Row
from profiles.summaries import Summary, summary

ASKED = {
    "peak_reserved_bytes": "Memory that torch reserves, at its peak.",
    "device_used_bytes": "Memory that the driver reports, at its peak.",
    "ttft_s": "Time to the first token.",
    "tpot_s": "Time of each token after it.",
    "step_s": "A training step.",
}


def cards(rows: Sequence[Row]) -> None:
    """Mean error without its sign of held-out rows, and what nine in ten are within."""
    asked = [row for row in rows if row.quantity in ASKED and row.relative_error is not None]
    held_out = [row for row in asked if row.split == "held-out"]
    which = "runs that no constant was fitted on (held-out)" if held_out else "all these runs"
    known = held_out or [replace(row, split=None) for row in asked]
    if not known:
        return
    with st.container(horizontal=True):
        for s in summary(known):
            _card(s)
    st.caption(f"Mean error of the prediction, its sign left out, over {which}.")


def _card(s: Summary) -> None:
    worst = f"{s.n} runs; the worst is off by {share(s.worst_abs_error)}."
    st.metric(
        charts.label(s.quantity),
        share(s.mean_abs_error),
        f"9 in 10 within {share(s.p90_abs_error)}",
        help=f"{ASKED[s.quantity]} {worst}",
        border=True,
        delta_color="off",
        delta_arrow="off",
    )


def share(error: float | None) -> str:
    """An error in percent, with as many digits as tell something."""
    if not error:
        return "0 %"
    if error < 0.0001:
        return "< 0.01 %"
    return f"{100 * error:.{2 if error < 0.0095 else 1}f} %"
