"""What would make a plan fit, each as a button that sets the widgets."""

from __future__ import annotations

from collections.abc import Mapping

import streamlit as st

import planner
from planner.format import gib

WIDGETS = {
    "kv_dtype": "kv_dtype",
    "tensor_parallel": "tp",
    "pipeline_parallel": "pp",
    "data_parallel_shards": "shards",
    "gpu": "gpu",
    "checkpointing": "checkpointing",
    "optimizer": "optimizer",
    "method": "method",
    "logits": "logits",
}
"""The widget of a field; weights have one of their own in training."""

BESIDE = frozenset({"weight_dtype", "lora"})
"""Fields that are set with others, or by a widget that depends on the workload."""

MOST = 4


def offered(
    model: planner.Model,
    work: planner.Inference | planner.Training,
    deploy: planner.Deployment,
) -> None:
    """The ways with the most room; a sentence where there is none."""
    with st.spinner("Looking for what would make it fit …"):
        ways = planner.ways_to_fit(model, work, deploy, only=BESIDE.union(WIDGETS))
    if not ways:
        st.caption("No one change of the deployment makes it fit, and no two.")
        return
    st.markdown("**What makes it fit**: take one")
    weights = "frozen_in" if isinstance(work, planner.Training) else "weights"
    with st.container(horizontal=True):
        for way in ways[:MOST]:
            st.button(
                f"{way.change} · {gib(way.estimate.headroom_bytes)} free",
                key=f"way {way.change}",
                on_click=_take,
                args=(chosen(way, weights=weights),),
                icon=":material/build:",
            )


def chosen(way: planner.Way, *, weights: str) -> dict[str, str]:
    """What the widgets are to show."""
    keys = {**WIDGETS, "weight_dtype": weights}
    return {keys[field]: str(value) for field, value in way.sets.items() if field in keys}


def _take(values: Mapping[str, str]) -> None:
    for key, value in values.items():
        st.session_state[key] = value
