"""Explore: how far a deployment goes, what another would change, and how few GPUs do it."""

import re
from collections.abc import Callable
from typing import Any

import pandas as pd
import streamlit as st

import planner
from app import explore_charts, explore_controls, explore_rate, measurements, widgets
from app.explore_controls import Exploration
from planner.format import gib, seconds
from planner.report import csv_text
from planner.result import off_by

LINES_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LADDER = (
    "t4", "l4", "rtx-3090", "rtx-4090", "rtx-5090", "l40s", "a100-40gb", "a100-80gb", "h100-80gb",
    "h200", "b200", "mi300x",
)  # fmt: skip


@st.cache_data(show_spinner=False, max_entries=32)
def swept(
    _model: planner.Model,
    name: str,
    deploy: planner.Deployment,
    output_tokens: int,
    batches: tuple[int, ...],
    contexts: tuple[int, ...],
) -> Any:
    """The map's cells."""
    return planner.sweep(
        _model,
        deploy.gpu,
        batches,
        contexts,
        output_tokens=output_tokens,
        runtime=deploy.runtime,
        kv_dtype=deploy.kv_dtype,
        tensor_parallel=deploy.tensor_parallel,
    )


@st.cache_data(show_spinner=False, max_entries=32)
def lines(
    _model: planner.Model, name: str, deploy: planner.Deployment, output_tokens: int
) -> dict[str, dict[int, int]]:
    """The longest context at some batches, by what keys and values are kept in."""
    from dataclasses import replace

    found: dict[str, dict[int, int]] = {}
    for kv_dtype in (None, *explore_controls.planner_kv_dtypes(deploy.runtime)):
        label = kv_dtype or _model.dtype
        if label in found or (label in ("fp32", "fp16", "bf16") and kv_dtype is not None):
            continue
        line: dict[int, int] = {}
        for batch in LINES_BATCHES:
            work = planner.Inference(
                batch=batch, prompt_tokens=1, output_tokens=output_tokens, logits="last"
            )
            try:
                line[batch] = planner.max_context_tokens(
                    _model, work, replace(deploy, kv_dtype=kv_dtype)
                )
            except planner.ConfigError:
                break
            if not line[batch]:
                break
        if any(line.values()):
            found[label] = line
    return found


@st.cache_data(show_spinner=False, max_entries=32)
def ladder(
    _model: planner.Model,
    name: str,
    work: planner.Inference,
    deploy: planner.Deployment,
    prices: dict[str, float],
) -> pd.DataFrame:
    """The fewest of each GPU, of those with a price where there are any."""
    names = list(prices or dict.fromkeys((*LADDER, deploy.gpu)))
    return planner.gpu_ladder(_model, work, deploy, names=names, price_per_hour=prices)


def chart(figure: object, words: str) -> None:
    """A figure as all of them are shown."""
    st.plotly_chart(figure, width="stretch", config={"displayModeBar": False}, alt=words)


def guarded(show: Callable[[], None]) -> None:
    """A part of the page; what it refuses is said in its place."""
    try:
        show()
    except planner.ConfigError as error:
        st.error(str(error))


def fit_map(explored: Exploration) -> None:
    """What fits, over batches and contexts, with the cells that were measured."""
    table = swept(
        explored.model,
        explored.model.name,
        explored.deploy,
        explored.output_tokens,
        explored.batches,
        explored.contexts,
    )
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.subheader("What fits")
        st.download_button(
            "Download CSV",
            csv_text(table),
            file_name=re.sub(r"[^\w.-]+", "-", f"{explored.model.name}_{explored.deploy.gpu}.csv"),
            mime="text/csv",
            on_click="ignore",
            icon=":material/download:",
        )
    reasons = set(table["refused"]) - {""}
    if len(reasons) == 1 and (table["refused"] != "").all():
        raise planner.ConfigError(next(iter(reasons)))
    left = "of the KV pool" if explored.deploy.runtime == "vllm" else "of the memory"
    st.caption(
        f"GiB {left} that stay free; red, below zero: what is missing. ◆ measured near there."
    )
    chart(
        explore_charts.fit_map(table, measured=measured(explored)),
        explore_charts.fit_map_in_words(table),
    )


def measured(explored: Exploration) -> list[tuple[int, int]]:
    """(batch, context) of the records of this model, GPU and runtime."""
    try:
        found = measurements.loaded()
    except planner.ConfigError:
        return []
    return [
        (record.batch, record.prompt_tokens + record.output_tokens - 1)
        for record in found.values()
        if record.model == explored.model.name
        and record.environment.gpu == explored.deploy.gpu
        and record.runtime == explored.deploy.runtime
    ]


def longest(explored: Exploration) -> None:
    """The longest context by batch and KV dtype."""
    st.subheader("Longest context")
    found = lines(explored.model, explored.model.name, explored.deploy, explored.output_tokens)
    if not found:
        st.info("Not even one sequence fits.")
        return
    chart(
        explore_charts.longest_contexts(found, limit=explored.model.max_position_embeddings),
        explore_charts.longest_in_words(found),
    )


def work_of(explored: Exploration) -> planner.Inference:
    """The point at which deployments are compared."""
    left, right = st.columns(2)
    with left:
        batch = widgets.number("Batch", "batch", help="Of the comparison and the ladder.")
    with right:
        prompt = widgets.number("Prompt tokens", "prompt", step=256)
    return planner.Inference(
        batch=batch,
        prompt_tokens=prompt,
        output_tokens=explored.output_tokens,
        logits="last",
    )


def compared(explored: Exploration, work: planner.Inference) -> None:
    """Deployment A beside a second one, by component."""
    second = explore_controls.other(explored)
    a, b = (planner.estimate(explored.model, work, d) for d in (explored.deploy, second))
    left, right = st.columns(2)
    for column, name, e in ((left, "A", a), (right, "B", b)):
        with column:
            st.metric(f"{name}: total on {e.gpu.label}", gib(e.memory.total_bytes), border=True)
            st.caption(e.verdict)
    columns = {
        f"{name}: {side(e)}": figures(e, explored.model, work, d)
        for name, e, d in (("A", a, explored.deploy), ("B", b, second))
    }
    st.dataframe(
        pd.DataFrame(columns).rename_axis("per GPU").reset_index(),
        hide_index=True,
        column_config=dict.fromkeys(columns, st.column_config.TextColumn(alignment="right")),
        alt="Limits and times of both deployments",
    )
    table = planner.what_if(a, b)
    chart(explore_charts.change(table), explore_charts.change_in_words(table))


def side(e: planner.Estimate) -> str:
    """What tells a deployment from the other."""
    n = e.deploy.tensor_parallel
    return f"{f'{n} × ' if n > 1 else ''}{e.gpu.name}, {e.setting.kv_dtype} KV"


def figures(e: planner.Estimate, *asked: Any) -> dict[str, str]:
    """What people compare deployments by."""
    limits = {
        "longest context, tokens": planner.max_context_tokens,
        "largest batch": planner.max_batch,
    }
    return {
        "KV cache": gib(e.memory.kv_cache_bytes),
        **{name: f"{ask(*asked):,}" for name, ask in limits.items()},
        "TTFT": f"{seconds(e.latency.ttft_s)}{off_by(e.latency.ttft_s, e.latency.ttft_interval_s)}",
        "TPOT": f"{seconds(e.latency.tpot_s)}{off_by(e.latency.tpot_s, e.latency.tpot_interval_s)}",
        "output tokens/s": f"{e.latency.output_tokens_per_s:,.0f}",
    }


def rungs(explored: Exploration, work: planner.Inference, prices: dict[str, float]) -> None:
    """How few GPUs of each kind hold the work."""
    if explored.deploy.runtime != "vllm":
        st.caption(f"{explored.deploy.runtime} is planned on one GPU; vllm on several.")
    table = ladder(explored.model, explored.model.name, work, explored.deploy, prices)
    for name in ("bought_memory_bytes", "headroom_bytes"):
        table[name.removesuffix("_bytes").replace("_", " ")] = [
            "" if pd.isna(size) else gib(int(size)) for size in table[name]
        ]
    st.dataframe(
        table,
        hide_index=True,
        column_order=[
            "gpu", "gpus", *["price_per_hour"] * bool(prices), "tensor_parallel",
            "pipeline_parallel", "bought memory", "headroom", "why_not",
        ],
        column_config={
            "gpus": st.column_config.ProgressColumn(
                "GPUs", format="%d", min_value=0, max_value=16
            ),
            "tensor_parallel": "tensor parallel",
            "pipeline_parallel": "pipeline stages",
            "price_per_hour": st.column_config.NumberColumn("price an hour", format="%.2f"),
            "why_not": "why not",
        },
        alt="The fewest GPUs of each kind that hold this work",
    )  # fmt: skip


st.header("Explore")
try:
    explored = explore_controls.sidebar()
    planner.estimate(
        explored.model,
        explored.work(1, explored.contexts[0]),
        explored.deploy,
    )
except planner.ConfigError as error:
    st.error(str(error))
    st.stop()

st.caption(
    f"{explored.model.name} in {explored.deploy.runtime} on "
    f"{planner.gpu_named(explored.deploy.gpu).label}, {explored.output_tokens:,} output tokens"
)
guarded(lambda: fit_map(explored))
guarded(lambda: longest(explored))
st.subheader("A against B")
work = work_of(explored)
guarded(lambda: compared(explored, work))
st.subheader("Fewest GPUs")
try:
    prices = explore_controls.prices()
except planner.ConfigError as error:
    st.error(str(error))
    prices = {}
guarded(lambda: rungs(explored, work, prices))
if explored.deploy.runtime == "vllm":
    guarded(lambda: explore_rate.served(explored.model, work, explored.deploy, prices))
