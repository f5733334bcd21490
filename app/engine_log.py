"""A pasted start-up log beside the plan: why an engine reports something else."""

from __future__ import annotations

import pandas as pd
import streamlit as st

import planner

HELP = (
    "The start-up of vLLM (weights, KV cache, blocks, graphs) or torch's OutOfMemoryError. It is "
    "read here and kept nowhere; nothing that it names is opened."
)


def pasted_log(e: planner.Estimate) -> None:
    """Text in; what it says beside the plan of its own deployment, and what would make it fit."""
    with st.expander("Why does my engine report something else?"):
        text = st.text_area(
            "Paste a start-up log or an out-of-memory message",
            key="engine log",
            height=160,
            max_chars=2_000_000,
            help=HELP,
        )
        if not text.strip():
            return
        try:
            explained = beside(text, e)
        except planner.ConfigError as error:
            st.error(str(error))
            return
        show(explained)


def beside(text: str, e: planner.Estimate) -> planner.Explanation:
    """The log's own deployment; model and GPU of the page where the log names none."""
    explained = planner.explain_log(text)
    if e.gpu.name in explained.gpus_alike[1:]:
        explained = planner.explain_log(text, gpu=e.gpu.name)
    if explained.estimate is not None:
        return explained
    named = explained.log.arguments.model is not None
    gpu = None if explained.gpu_known else e.gpu.name
    if named and gpu is None:
        return explained  # it names a model that is not known: another one would mislead
    return planner.explain_log(text, None if named else e.model, gpu=gpu)


def show(explained: planner.Explanation) -> None:
    """Verdict, table, remedies and what was assumed."""
    st.markdown(f"**{explained.title}**")
    (st.warning if explained.fits is False else st.info)(explained.verdict)
    rows = [
        [
            line.item,
            line.shown(line.theirs),
            line.shown(line.ours),
            line.shown(line.difference, signed=True),
            line.why,
        ]
        for line in explained.lines
    ]
    st.dataframe(
        pd.DataFrame(rows, columns=["", "printed", "planned", "difference", "why"]),
        hide_index=True,
        column_config={
            name: st.column_config.TextColumn(alignment="right", width="small")
            for name in ("printed", "planned", "difference")
        },
        alt="What the engine printed beside what is planned, with the reason of each difference",
    )
    if explained.remedies:
        st.markdown("What would help, by the planner")
        st.dataframe(
            pd.DataFrame(
                [[r.change, r.effect, r.fits] for r in explained.remedies],
                columns=["change", "then", "fits"],
            ),
            hide_index=True,
            alt="Changes to how the engine is started, and what the planner says they do",
        )
    for note in explained.notes:
        st.caption(note)
