"""Check: is this transformer right? Sharp edges of a config or of pasted source, with remedies."""

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
import streamlit as st

import planner
from app import controls, widgets
from planner.checks.source import check_text
from planner.checks.written import markdown, plain, sarif, table
from planner.findings import SHARP, Finding, worst_first
from planner.report import csv_text

Colour = Literal["red", "orange", "yellow", "gray"]
LOOKS: dict[str, tuple[Colour, str, str]] = {
    "critical": ("red", ":material/dangerous:", "Wrong results or a crash"),
    "high": ("orange", ":material/error:", "It costs a training run or an outage"),
    "medium": ("yellow", ":material/warning:", "It costs quality, time or memory"),
    "info": ("gray", ":material/info:", "Good to know"),
}
PASTED = "pasted.py"
SOURCE_HELP = "Python, up to a million characters. It is parsed here, never run, and kept nowhere."


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is checked, and the load it is to carry."""

    model: planner.Model
    load: dict[str, Any]


def sidebar() -> Asked:
    """The widgets; every choice is in the link."""
    asked = st.query_params.to_dict()
    with st.sidebar:
        problems = st.container()
        named = widgets.select("Model", "model")
        described = st.empty()
        own = controls.own_config()
        gpu = planner.gpu_named(widgets.select("GPU", "gpu", help=controls.memories()))
        runtime = widgets.select("Runtime", "runtime", "What holds the cache.")
        left, right = st.columns(2)
        with left:
            batch = widgets.number("Batch", "batch", help="Sequences at once.")
        with right:
            context = widgets.number("Context", "context", step=1024, help="Tokens of each.")
        parallel = int(widgets.select("Tensor parallel", "tp", help="GPUs that share each layer."))
        for problem in controls.link_problems(asked, taken=st.session_state):
            problems.warning(problem)
    model = planner.load_model(named) if own is None else controls.uploaded(*own)
    described.caption(controls.in_words(model))
    load = {
        "gpu": gpu.name,
        "runtime": runtime,
        "batch": batch,
        "context_tokens": context,
        "tensor_parallel": parallel,
    }
    return Asked(model=model, load=load)


def summary(found: list[Finding], name: str) -> None:
    """How many of each severity, and the findings as files."""
    counts = Counter(f.severity for f in found)
    with st.container(horizontal=True):
        for severity in SHARP:
            label = severity.capitalize()
            st.metric(label, counts[severity], border=True, help=LOOKS[severity][2])
    if not found:
        st.success("Nothing found: none of the known sharp edges.", icon=":material/check_circle:")
        return
    stem = re.sub(r"[^\w.-]+", "-", name)
    with st.container(horizontal=True):
        for label, content, file, mime in (
            ("CSV", csv_text(table(found)), f"{stem}.csv", "text/csv"),
            ("Markdown", markdown(found, name), f"{stem}.md", "text/markdown"),
            ("SARIF", sarif(found, name), f"{stem}.sarif", "application/json"),
        ):
            st.download_button(
                f"Download {label}",
                content,
                file_name=file,
                mime=mime,
                on_click="ignore",
                icon=":material/download:",
            )


def card(f: Finding) -> None:
    """One finding: what was seen, why it matters, how it shows, what to do."""
    colour, icon, _ = LOOKS[f.severity]
    with st.container(border=True):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.badge(f.severity, icon=icon, color=colour)
            st.markdown(f"**{plain(f.title)}**")
            if f.where:
                st.markdown(f":gray[{plain(f.where)}]")
        st.markdown(plain(f.seen))
        left, right = st.columns([3, 2])
        with left:
            st.markdown(f":green[:material/build:] **What to do** · {plain(f.do)}")
        with right:
            st.caption(f"**Why** · {plain(f.why)}")
            if f.symptoms:
                st.caption(f"**It shows as** · {plain(f.symptoms)}")
        if f.next:
            st.caption(f"Next: {', '.join(f.next)} · `{f.id}`")


def findings(found: list[Finding], name: str) -> None:
    """All of them, the worst first."""
    summary(found, name)
    for f in found:
        card(f)


def of_config() -> None:
    """The model of the sidebar under its load."""
    try:
        asked = sidebar()
        found = planner.check(asked.model, **asked.load)
    except planner.ConfigError as error:
        st.error(str(error))
        return
    at = f"batch {asked.load['batch']} × {asked.load['context_tokens']:,} tokens"
    label = planner.gpu_named(asked.load["gpu"]).label
    n = asked.load["tensor_parallel"]
    gpus = f"{n} × {label}" if n > 1 else label
    st.caption(f"{asked.model.name} in {asked.load['runtime']} on {gpus}, {at}")
    findings(found, asked.model.name)


def of_source() -> None:
    """Pasted Python, parsed and not run."""
    code = st.text_area(
        "Paste a model's source",
        key="source",
        height=260,
        max_chars=1_000_000,
        help=SOURCE_HELP,
        placeholder="class CausalSelfAttention(nn.Module): …",
    )
    if not code.strip():
        st.caption(
            "It is parsed and never run. `planner check FILE` does the same to whole folders."
        )
        return
    try:
        found = worst_first(check_text(code.encode("utf-8", errors="replace"), PASTED))
    except planner.ConfigError as error:
        st.error(str(error))
        return
    findings(found, PASTED)


def catalogue() -> None:
    """Every edge that is known."""
    rows = [
        [e.severity, e.title, e.pattern, e.remedy, ", ".join(e.found_in), ", ".join(e.next)]
        for e in planner.edges().values()
        if e.id != "not-checked"
    ]
    columns = ["severity", "edge", "pattern", "what to do", "found in", "next"]
    st.dataframe(
        pd.DataFrame(rows, columns=columns),
        hide_index=True,
        height=520,
        alt="The catalogue of sharp edges: severity, pattern, remedy, where they are looked for",
    )
    st.caption(
        "Modules are probed from a shell or from Python: `planner check pkg.mod:make`, "
        "`attnlab.probes.check(module)`."
    )


st.header("Check")
config, source, known = st.tabs(["Config", "Source", "Catalogue"])
with config:
    of_config()
with source:
    of_source()
with known:
    catalogue()
