"""Plan: will this model, in this runtime, on this GPU, hold this workload?"""

import re
from collections.abc import Callable
from typing import TypeAlias

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

import planner
from app import charts, controls, remedies, trust
from app.engine_log import pasted_log
from planner.format import gib, seconds
from planner.report import csv_text
from planner.result import binding, new_lengths, off_by
from planner.runtimes import runtime_named

# What was asked for; an estimate's own model is as the runtime builds it.
Asked: TypeAlias = tuple[planner.Model, planner.Inference | planner.Training, planner.Deployment]


def limit(number: int) -> str:
    """A limit in words; 0 means that nothing fits."""
    return f"{number:,}" if number else "none"


def is_training(e: planner.Estimate) -> bool:
    """Whether a training step is planned."""
    return isinstance(e.work, planner.Training)


def head(e: planner.Estimate) -> None:
    """Which plan this is, and the verdict."""
    n = e.deploy.world_size
    st.header(f"{e.model.name} on {f'{n} × ' if n > 1 else ''}{e.gpu.label}")
    runtime = runtime_named(e.deploy.runtime)
    st.caption(
        f"{runtime.name} {runtime.version} · {e.setting.attention} attention · {e.setting.dtype}"
        f"{f', {e.deploy.weight_dtype} weights' if e.deploy.weight_dtype else ''}"
        f"{'' if is_training(e) else f', KV cache {e.setting.kv_dtype}'} · {e.work.in_words}"
    )
    if e.fits:
        st.success(e.verdict, icon=":material/check_circle:")
    else:
        st.error(e.verdict, icon=":material/cancel:")
    if n > 1:
        st.caption(f"All memory is that of one GPU, the fullest: {e.share.in_words}.")


def numbers(e: planner.Estimate) -> tuple[DeltaGenerator, ...]:
    """The figures people come for; returns the places of those that take longest."""
    m = e.memory
    with st.container(horizontal=True):
        card("Total", gib(m.total_bytes), f"{m.total_bytes:,} bytes")
        of = "the GPU's memory" if e.kv_pool_bytes is None else "the KV pool"
        room = abs(e.headroom_bytes)
        card(
            "Missing" if e.headroom_bytes < 0 else "Headroom",
            gib(room),
            f"{room:,} bytes of {of}",
        )
        if is_training(e):
            states = m.weights_bytes + m.gradients_bytes + m.optimizer_bytes
            card("Model states", gib(states), "Weights, gradients and the optimizer's states")
        else:
            card("KV cache", gib(m.kv_cache_bytes), f"{m.kv_cache_bytes:,} bytes")
        places = st.empty(), st.empty()
        for place, label in zip(places, (longest_label(e), "Largest batch"), strict=True):
            with place:
                card(label, "…")
    with st.container(horizontal=True):
        if e.kv_pool_bytes is not None and e.kv_pool_tokens is not None:
            pool = f"{gib(e.kv_pool_bytes)} hold so many tokens of this model"
            card("KV pool tokens", f"{e.kv_pool_tokens:,}", pool)
            if e.max_concurrency is not None and e.pool is not None:
                longest = (
                    f"Requests of {e.pool.longest_tokens:,} tokens that the pool holds at once"
                )
                card("At full length", f"{e.max_concurrency:,.1f}", longest)
        times(e)
        reserved = st.empty()
        if e.memory.simulated:
            with reserved:
                card("Reserved by torch", "…")
    note = new_lengths(e.latency)
    more = f" {note[:1].upper()}{note[1:]}." if note else ""
    st.caption(f"Times: {'; '.join((e.latency.basis, *binding(e.latency)))}.{more}")
    return (*places, reserved, st.empty(), st.container())


def longest_label(e: planner.Estimate) -> str:
    """What the first limit is of."""
    return "Longest sequence" if is_training(e) else "Longest context"


def times(e: planner.Estimate) -> None:
    """The times of a step, or of the first token and those after it."""
    if is_training(e):
        if e.latency.step_s is None or e.latency.trained_tokens_per_s is None:
            return
        timed("Step", e.latency.step_s, e.latency.step_interval_s)
        card("Trained tokens/s", f"{e.latency.trained_tokens_per_s:,.0f}", "Of the whole batch")
        return
    timed("TTFT", e.latency.ttft_s, e.latency.ttft_interval_s, "Time to the first token. ")
    timed("TPOT", e.latency.tpot_s, e.latency.tpot_interval_s, "Time of each token after it. ")
    card("Output tokens/s", f"{e.latency.output_tokens_per_s:,.0f}", "Of the whole batch")


def timed(
    label: str, time_s: float | None, interval: tuple[float, float] | None, what: str = ""
) -> None:
    """A time, and how far off it may be."""
    if time_s is None or interval is None:
        why = "None with one output token" if time_s is None else "How far off is not known"
        card(label, seconds(time_s), what + why)
        return
    low, high = (seconds(end) for end in interval)
    help = f"{what}Nine in ten within {low} and {high}"
    card(label, f"{seconds(time_s)}{off_by(time_s, interval)}", help)


def torch_holds(e: planner.Estimate, place: DeltaGenerator, below: DeltaGenerator) -> None:
    """What torch's allocator reserves, and what it has to do for that, where it is simulated."""
    played = e.allocator()
    if played is None:
        return
    with place:
        card(
            "Reserved by torch",
            gib(played.stats.peak_reserved_bytes),
            f"Peak of its segments, for {gib(played.stats.peak_allocated_bytes)} in use",
        )
    if played.oom is not None and e.fits:
        below.warning(f"The parts fit, torch's segments may not: {played.note}.")
    else:
        below.caption(f"Reserved by torch: {played.note}.")


def card(label: str, number: str, help: str | None = None) -> None:
    """One figure."""
    st.metric(label, number, border=True, help=help)


def answer(asked: Asked, label: str, question: Callable[..., int], help: str) -> None:
    """A limit of the plan; none where a smaller one is refused, with the reason."""
    try:
        card(label, limit(question(*asked)), help)
    except planner.ConfigError as error:
        card(label, limit(0), str(error))


def peak(e: planner.Estimate) -> None:
    """What causes the peak: the op, and the tensors that live while it runs."""
    layer = "" if e.peak.layer is None else f" in layer {e.peak.layer}"
    st.subheader("What causes the peak")
    st.markdown(f"**{e.peak_phase}**, at **{e.peak.op}**{layer}. Alive beside the weights:")
    if e.peak_note:
        st.caption(f"This peak is {e.peak_note}.")
    st.plotly_chart(
        charts.timeline(e),
        width="stretch",
        config={"displayModeBar": False},
        alt=charts.timeline_in_words(e),
    )
    held = [("KV cache at that moment", 1, e.peak.cache_bytes)] if e.peak.cache_bytes else []
    buffers = [*held, *e.peak.buffers]
    most = max((size for _, _, size in buffers), default=0)
    st.dataframe(
        pd.DataFrame(
            [(name, n, gib(size), size / most if most else 0.0) for name, n, size in buffers],
            columns=["tensor", "count", "size", "share"],
        ),
        hide_index=True,
        column_config={
            "count": st.column_config.NumberColumn(width="small"),
            "size": st.column_config.TextColumn(width="small", alignment="right"),
            "share": st.column_config.ProgressColumn(
                "", format=" ", min_value=0.0, max_value=1.0, width="medium"
            ),
        },
        alt="Tensors alive at the peak, with their sizes",
    )


def ledger(e: planner.Estimate) -> None:
    """Every number down to its formula, on the page and as a file."""
    table = e.table()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        st.subheader("Every number, opened")
        st.download_button(
            "Download CSV",
            csv_text(table),
            file_name=re.sub(r"[^\w.-]+", "-", f"{e.model.name}_{e.gpu.name}.csv"),
            mime="text/csv",
            on_click="ignore",
            icon=":material/download:",
        )
    table.insert(2, "size", [gib(size) for size in table["bytes"]])
    st.dataframe(
        table,
        hide_index=True,
        column_order=[
            "component", "item", "size", "bytes", "count", "formula", "substituted", "note",
        ],
        column_config={
            "size": st.column_config.TextColumn(alignment="right"),
            "bytes": st.column_config.NumberColumn(format="localized"),
            "count": st.column_config.NumberColumn(width="small"),
        },
        alt="The ledger of the estimate: one row a number, with its formula",
    )  # fmt: skip
    if e.model.defaults:
        st.caption(f"config.json is silent on, taken by default: {', '.join(e.model.defaults)}")
    with st.expander("In words"):
        st.code(e.explain(), language=None, wrap_lines=True)


try:
    asked = controls.sidebar()
    estimate = planner.estimate(*asked)
except planner.ConfigError as error:
    st.header("Plan")
    st.error(str(error))
    st.stop()

head(estimate)
ways = st.container()
longest, largest, reserved, below, trusted = numbers(estimate)
st.subheader("Where the memory goes")
st.plotly_chart(
    charts.memory_breakdown(estimate),
    width="stretch",
    config={"displayModeBar": False},
    alt=charts.memory_in_words(estimate),
)
peak(estimate)
ledger(estimate)
if not is_training(estimate):
    pasted_log(estimate)

with longest:  # dozens of estimates: the page stands before they are done
    answer(
        asked,
        longest_label(estimate),
        planner.max_context_tokens,
        "At this batch, up to the model's positions; of an inference, prompt + output − 1 tokens",
    )
with largest:
    answer(asked, "Largest batch", planner.max_batch, "Sequences at once, at these lengths")
if not estimate.fits:
    with ways:
        remedies.offered(*asked)
torch_holds(estimate, reserved, below)  # plays the whole generation
with trusted:  # may read and compare records
    trust.line(*asked)
