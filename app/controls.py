"""Widgets in, planner types out. Every choice is kept in the URL, so that a plan is a link.

Options are the planner's own short names, for the URL holds what a widget shows: `?gpu=h200` means
the same on every machine. What a name stands for is written below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import streamlit as st

import planner
from app.training_controls import beside, sharded, training
from app.widgets import AS_MODEL, CHOICES, LARGEST, NUMBERS, START, either, number, select
from planner.experts import has_experts
from planner.format import count, gib
from planner.loading import read_json
from planner.routing import routing_spec
from planner.runtimes import runtime_named
from planner.runtimes.quantised_cache import backends_of
from planner.training import PLANNED as TRAINED_RUNTIMES

KV_HELP = (
    "What keys and values are kept in. transformers quantises with a QuantizedCache, of full "
    "attention only."
)

MODE_HELP = (
    "eager: one kernel at a time, as generate() does, which a busy host slows down. captured: the "
    "same kernels in a CUDA graph. graph: as the runtime makes its graphs; attnlab's are compiled."
)

ROUTING_HELP = (
    "How tokens pick experts, which times depend on. uniform: at random. balanced: dealt out in "
    "turn, as benchmarks do. zipf: by a popularity that falls as this power of the rank."
)


def sidebar() -> tuple[planner.Model, planner.Inference | planner.Training, planner.Deployment]:
    """The plan that the widgets describe; ConfigError if they contradict each other."""
    asked = st.query_params.to_dict()  # before the widgets drop what they refuse
    with st.sidebar:
        problems = st.container()
        named = select("Model", "model")
        described = st.empty()
        upload = st.file_uploader(
            "or a config.json of your own",
            type="json",
            max_upload_size=8,
            help="Read by the planner, kept nowhere. It takes the place of the model above.",
        )
        deploy = _deployment()
        work = _workload(deploy)
        routing = st.container()
        if isinstance(work, planner.Training):
            deploy = beside(work, deploy)
            if deploy.runtime == "transformers" and work.method == "full":
                deploy = sharded(deploy)
        for problem in link_problems(asked, taken=st.session_state):
            problems.warning(problem)
    # last: a file that is no model must not take the other widgets off the page
    model = planner.load_model(named) if upload is None else uploaded(upload.name, upload.read())
    described.caption(("" if upload is None else f"{upload.name}: ") + in_words(model))
    if has_experts(model):
        with routing:
            work = replace(work, routing=routing_spec(select("Routing", "routing", ROUTING_HELP)))
    return model, work, deploy


def link_problems(asked: Mapping[str, str], *, taken: Mapping[str, object]) -> list[str]:
    """What a link asked for that does not exist, and what is taken instead; a sentence each."""
    problems = []
    for key, value in asked.items():
        if key in CHOICES and value not in CHOICES[key]:
            why = "is not known"
        elif key in NUMBERS and not _is_size(value):
            why = f"is not a whole number from 1 to {LARGEST:,}"
        elif (offered := _offered(key, taken)) and value not in offered:
            why = f"is not one of {', '.join(offered)}"
        else:
            continue
        short = value if len(value) <= 40 else f"{value[:37]}..."
        problems.append(f"{key}={short!r} in the link {why}: {taken.get(key, START[key])} is taken")
    return problems


def kv_dtypes(taken: Mapping[str, object]) -> tuple[str, ...]:
    """What the cache of the runtime that is taken can be kept in."""
    runtime = str(taken.get("runtime") or START["runtime"])
    return (AS_MODEL, *runtime_named(runtime).kv_dtypes)


def _offered(key: str, taken: Mapping[str, object]) -> tuple[str, ...]:
    """What a widget offers where that depends on the others; empty where it does not."""
    match key:
        case "kv_dtype":
            return kv_dtypes(taken)
        case "kv_backend":
            return backends_of(str(taken.get("kv_dtype", START["kv_dtype"])))
    return ()


def in_words(model: planner.Model) -> str:
    """The size of a model in one line."""
    active = model.active_parameter_count
    routed = f" ({count(active)} active)" if active != model.parameter_count else ""
    limit = model.max_position_embeddings
    positions = "positions without end" if limit is None else f"{limit:,} positions"
    return (
        f"{count(model.parameter_count)} parameters{routed}, {len(model.layers)} layers, "
        f"{positions}, {model.dtype}"
    )


def uploaded(file_name: str, content: bytes) -> planner.Model:
    """The model of an uploaded config, named after its file; ConfigError if it is none."""
    model = planner.read_config(read_json(content, origin=file_name))
    stem = Path(file_name).stem
    return model if stem == "config" else replace(model, name=stem)


def _deployment() -> planner.Deployment:
    gpu = planner.gpu_named(select("GPU", "gpu", help=memories()))
    st.caption(f"{gpu.label}: {gib(gpu.memory_bytes)}")
    runtime = st.segmented_control(
        "Runtime",
        CHOICES["runtime"],
        default=START["runtime"],
        required=True,
        width="stretch",
        key="runtime",
        bind="query-params",
        help="What holds the memory: the same model has other numbers in each.",
    )
    left, right = st.columns(2)
    with left:
        dtype = select("dtype", "dtype")
    named = runtime or str(START["runtime"])
    with right:
        kept = kv_dtypes({"runtime": named})
        kv_dtype = select("KV dtype", "kv_dtype", options=kept, help=KV_HELP)
    mode = either("Steps launched", "mode", MODE_HELP)
    tensor_parallel, pipeline_parallel = layout() if named == "vllm" else (1, 1)
    return planner.Deployment(
        gpu=gpu.name,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        runtime=named,
        mode=mode,  # type: ignore[arg-type]
        dtype=None if dtype == AS_MODEL else dtype,
        kv_dtype=None if kv_dtype == AS_MODEL else kv_dtype,
        cache=_cache(kv_dtype) if named == "transformers" else None,
    )


def layout() -> tuple[int, int]:
    """GPUs that share each layer, and stages of layers."""
    left, right = st.columns(2)
    with left:
        tensor_parallel = select("Tensor parallel", "tp", help="GPUs that share each layer.")
    with right:
        pipeline_parallel = select("Pipeline stages", "pp", help="Runs of layers, each its GPUs.")
    return int(tensor_parallel), int(pipeline_parallel)


def _cache(kv_dtype: str) -> planner.CacheSpec | None:
    """The settings of a quantised cache, where the dtype has any."""
    backends = backends_of(kv_dtype)
    if not backends:
        return None
    backend = select("Quantised by", "kv_backend", options=backends)
    left, right = st.columns(2)
    with left:
        group = number("KV group size", "kv_group", help="Elements that share a scale.")
    with right:
        residual = number(
            "KV residual tokens",
            "kv_residual",
            help="Decoded tokens kept unquantised until so many are there.",
        )
    return planner.CacheSpec(
        kind="quantised", backend=backend, q_group_size=group, residual_tokens=residual
    )


def _workload(deploy: planner.Deployment) -> planner.Inference | planner.Training:
    planned = ", ".join(TRAINED_RUNTIMES)
    if either("Workload", "workload", f"Training is planned in {planned}.") == "training":
        return training(deploy.runtime)
    torch = runtime_named(deploy.runtime).on_torch and deploy.runtime != "vllm"
    batch = number("Batch", "batch", help="Sequences at once.")
    left, right = st.columns(2)
    with left:
        prompt_tokens = number("Prompt tokens", "prompt", step=256)
    with right:
        output_tokens = number("Output tokens", "output", step=64)
    logits = "last"
    if torch:
        logits = either(
            "Logits of the prefill",
            "logits",
            "last: what generate() computes. all: a plain forward, a row for each token.",
        )
    return planner.Inference(
        batch=batch,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        logits="all" if logits == "all" else "last",
    )


def memories() -> str:
    """The catalogue's GPUs as a table."""
    lines = [f"| {g.name} | {g.label} | {gib(g.memory_bytes)} |" for g in planner.gpus().values()]
    return "\n".join(["| name | device | memory torch sees |", "|:--|:--|--:|", *lines])


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and 1 <= int(text[:12]) <= LARGEST
