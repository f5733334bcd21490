"""Widgets in, planner types out. Every choice is kept in the URL, so that a plan is a link.

Options are the planner's own short names, for the URL holds what a widget shows: `?gpu=h200` means
the same on every machine. What a name stands for is written below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import streamlit as st

import planner
from app.training_controls import beside, sharded, training
from app.widgets import AS_MODEL, CHOICES, LARGEST, NUMBERS, START, USUAL, either, number, select
from planner.experts import has_experts
from planner.format import count, gib
from planner.loading import read_json
from planner.quantization.on_load import ON_LOAD
from planner.routing import routing_spec
from planner.runtimes import RUNTIMES, runtime_named
from planner.runtimes.quantised_cache import backends_of
from planner.runtimes.training_only import TrainingOnly
from planner.training import PLANNED as TRAINED_RUNTIMES
from planner.workload import MODES

PASTED_CHARACTERS = 2_000_000

WEIGHTS_HELP = (
    "What plain weights are quantised to as they are loaded: fp8 as `vllm serve --quantization "
    "fp8`, int8 and nf4 as bitsandbytes, int8 and int4 of attnlab as torchao."
)

KV_HELP = (
    "What keys and values are kept in. transformers quantises with a QuantizedCache, of full "
    "attention only."
)

MODE_HELP = (
    "Times alone depend on it. eager: one kernel at a time, as generate() does, which a busy host "
    "slows down. graph: as the runtime makes its CUDA graphs; attnlab's are compiled. captured: "
    "attnlab's kernels in a graph, not compiled."
)

LAUNCHED_ONE_BY_ONE = ("transformers", "litgpt", "torchtune")
"""Runtimes that make no CUDA graphs unless they are told to."""

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
        own = own_config()
        planned = ", ".join(TRAINED_RUNTIMES)
        kind = either("Workload", "workload", f"Training is planned in {planned}.")
        deploy = _deployment(kind)
        work = training(deploy.runtime) if kind == "training" else _inference(deploy)
        routing = st.container()
        if isinstance(work, planner.Training):
            deploy = beside(work, deploy)
            if deploy.runtime == "transformers" and work.method == "full":
                deploy = sharded(deploy)
        for problem in link_problems(asked, taken=st.session_state):
            problems.warning(problem)
    # last: a file that is no model must not take the other widgets off the page
    model = planner.load_model(named) if own is None else uploaded(*own)
    described.caption(("" if own is None else f"Instead, {own[0]}: ") + in_words(model))
    if has_experts(model):
        with routing:
            work = replace(work, routing=routing_spec(select("Routing", "routing", ROUTING_HELP)))
    return model, work, deploy


def own_config() -> tuple[str, bytes] | None:
    """Name and content of a config that is uploaded or pasted; None where there is none."""
    help = "Read by the planner, kept nowhere. It takes the place of the model above."
    with st.expander("or a config.json of your own"):
        upload = st.file_uploader("A file", type="json", max_upload_size=8, help=help)
        pasted = st.text_area(
            "or its text",
            key="pasted config",
            height=120,
            max_chars=PASTED_CHARACTERS,
            placeholder='{"model_type": "llama", …}',
            help=help,
        )
    if upload is not None:
        return upload.name, upload.read()
    return ("pasted.json", pasted.encode(errors="replace")) if pasted.strip() else None


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


def weight_dtypes(taken: Mapping[str, object]) -> tuple[str, ...]:
    """What the runtime that is taken quantises weights to as it loads them."""
    return (AS_MODEL, *ON_LOAD.get(str(taken.get("runtime") or START["runtime"]), ()))


def modes(taken: Mapping[str, object]) -> tuple[str, ...]:
    """The ways to launch steps that differ in the runtime that is taken, its own first."""
    runtime = str(taken.get("runtime") or START["runtime"])
    return (USUAL, *(mode for mode in MODES if mode != "captured" or runtime == "attnlab"))


def usual_mode(runtime: str) -> Literal["eager", "graph"]:
    """How the runtime launches steps unless it is told otherwise."""
    return "eager" if runtime in LAUNCHED_ONE_BY_ONE else "graph"


def runtimes(workload: str) -> tuple[str, ...]:
    """Those that plan the workload."""
    if workload == "training":
        return tuple(name for name in RUNTIMES if name in TRAINED_RUNTIMES)
    return tuple(name for name, r in RUNTIMES.items() if not isinstance(r, TrainingOnly))


def _offered(key: str, taken: Mapping[str, object]) -> tuple[str, ...]:
    """What a widget offers where that depends on the others; empty where it does not."""
    match key:
        case "runtime":
            return runtimes(str(taken.get("workload") or START["workload"]))
        case "weights":
            return weight_dtypes(taken)
        case "mode":
            return modes(taken)
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


def _deployment(workload: str) -> planner.Deployment:
    gpu = planner.gpu_named(select("GPU", "gpu", help=memories()))
    st.caption(f"{gpu.label}: {gib(gpu.memory_bytes)}")
    named = select(
        "Runtime",
        "runtime",
        options=runtimes(workload),
        help="What holds the memory: the same model has other numbers in each.",
    )
    taken = {"runtime": named}
    left, right = st.columns(2)
    with left:
        dtype = select("dtype", "dtype", help="What is computed in, and kept unless said below.")
    with right:
        mode = select("Steps launched", "mode", options=modes(taken), help=MODE_HELP)
    if mode == USUAL:
        mode = usual_mode(named)
    weights, kv_dtype = _kept(taken) if workload == "inference" else (AS_MODEL, AS_MODEL)
    tensor_parallel, pipeline_parallel = layout() if named == "vllm" else (1, 1)
    return planner.Deployment(
        gpu=gpu.name,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        runtime=named,
        mode=mode,  # type: ignore[arg-type]
        dtype=None if dtype == AS_MODEL else dtype,
        weight_dtype=None if weights == AS_MODEL else weights,
        kv_dtype=None if kv_dtype == AS_MODEL else kv_dtype,
        cache=_cache(kv_dtype) if named == "transformers" else None,
    )


def _kept(taken: Mapping[str, object]) -> tuple[str, str]:
    """What weights and cache are kept in, where the runtime gives a choice."""
    offered, weights = weight_dtypes(taken), AS_MODEL
    left, right = st.columns(2)
    with left:
        if len(offered) > 1:
            weights = select("Weights", "weights", options=offered, help=WEIGHTS_HELP)
    with right if len(offered) > 1 else left:
        kv_dtype = select("KV dtype", "kv_dtype", options=kv_dtypes(taken), help=KV_HELP)
    return weights, kv_dtype


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


def _inference(deploy: planner.Deployment) -> planner.Inference:
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
