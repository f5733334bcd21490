"""The widgets of the page Explore: a model and a deployment over a map of batches and contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import streamlit as st

import planner
from app import controls, widgets
from planner.errors import shown
from planner.format import gib

BATCHES = tuple(2**i for i in range(11))
SHORTEST_CONTEXT = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Exploration:
    """What is explored: one deployment, the output length, and the cells of the map."""

    model: planner.Model
    deploy: planner.Deployment
    output_tokens: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]

    def work(self, batch: int, context: int) -> planner.Inference:
        """The workload of a cell, `generate`'s."""
        prompt = max(1, context - self.output_tokens + 1)
        return planner.Inference(
            batch=batch, prompt_tokens=prompt, output_tokens=self.output_tokens, logits="last"
        )


def sidebar() -> Exploration:
    """The exploration that the widgets describe."""
    asked = st.query_params.to_dict()
    with st.sidebar:
        problems = st.container()
        model = planner.load_model(widgets.select("Model", "model"))
        st.caption(controls.in_words(model))
        gpu = planner.gpu_named(widgets.select("GPU", "gpu", help=controls.memories()))
        st.caption(f"{gpu.label}: {gib(gpu.memory_bytes)}")
        runtime = widgets.select("Runtime", "runtime")
        tp = "1"
        left, right = st.columns(2)
        with left:
            kept = controls.kv_dtypes({"runtime": runtime})
            kv_dtype = widgets.select("KV dtype", "kv_dtype", options=kept)
        with right:
            if runtime == "vllm":
                tp = widgets.select("Tensor parallel", "tp", help="GPUs that share each layer.")
        output_tokens = widgets.number("Output tokens", "output", step=64)
        for problem in controls.link_problems(asked, taken=st.session_state):
            problems.warning(problem)
    deploy = planner.Deployment(
        gpu=gpu.name,
        runtime=runtime,
        kv_dtype=None if kv_dtype == widgets.AS_MODEL else kv_dtype,
        tensor_parallel=int(tp),
        mode=controls.usual_mode(runtime),
    )
    return Exploration(
        model=model,
        deploy=deploy,
        output_tokens=output_tokens,
        batches=BATCHES,
        contexts=contexts(model, output_tokens),
    )


def contexts(model: planner.Model, output_tokens: int) -> tuple[int, ...]:
    """Powers of two that leave a prompt, and the model's last position."""
    limit = model.max_position_embeddings or 2**20
    powers = [2**i for i in range(8, 21) if output_tokens <= 2**i < limit]
    return (*powers, limit) if limit >= output_tokens else (limit,)


def other(explored: Exploration) -> planner.Deployment:
    """Deployment B of the comparison."""
    a = explored.deploy
    columns = st.columns(3)
    with columns[0]:
        gpu = widgets.select("B: GPU", "b_gpu")
    with columns[1]:
        kept = (widgets.SAME, *planner_kv_dtypes(a.runtime))
        kv_dtype = widgets.select("B: KV dtype", "b_kv_dtype", options=kept)
    tp = widgets.SAME
    if a.runtime == "vllm":
        with columns[2]:
            tp = widgets.select("B: tensor parallel", "b_tp")
    return replace(
        a,
        gpu=a.gpu if gpu == widgets.SAME else gpu,
        kv_dtype=a.kv_dtype if kv_dtype == widgets.SAME else kv_dtype,
        tensor_parallel=a.tensor_parallel if tp == widgets.SAME else int(tp),
        gpus=1,
    )


def prices() -> dict[str, float]:
    """What GPUs cost an hour, as it is typed; ConfigError for what is not understood."""
    typed = st.text_input(
        "Prices an hour",
        key="prices",
        bind="query-params",
        placeholder="h200=3.5, l40s=0.9",
        max_chars=1000,
        help="Yours, in any currency: GPU=PRICE, with commas between. Only these GPUs are shown "
        "then, the cheapest first.",
    )
    return dict(_price(part) for part in typed.split(",") if part.strip())


def _price(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        price = float(value)
    except ValueError:
        price = math.nan
    if not 0 < price < math.inf:
        raise planner.ConfigError(f"{shown(text.strip())} is no price: such as h200=3.5")
    return planner.gpu_named(name.strip()).name, price


def planner_kv_dtypes(runtime: str) -> tuple[str, ...]:
    """What the runtime keeps keys and values in."""
    return tuple(d for d in controls.kv_dtypes({"runtime": runtime}) if d != widgets.AS_MODEL)
