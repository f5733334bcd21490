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
from planner.dtypes import COMPUTE_DTYPES, KV_DTYPES
from planner.errors import MAX_SIZE
from planner.format import count, gib
from planner.loading import read_json
from planner.runtimes import RUNTIMES, runtime_named
from planner.runtimes.quantised_cache import (
    DEFAULT_GROUP_SIZE,
    DEFAULT_RESIDUAL_TOKENS,
    backends_of,
)
from planner.training import PLANNED as TRAINED_RUNTIMES
from planner.workload import (
    CACHE_BACKENDS,
    CHECKPOINTING,
    MODES,
    OPTIMIZER_IMPLS,
    OPTIMIZERS,
    PRECISIONS,
    RESHARDED,
    SHARD_DTYPES,
)

AS_MODEL = "as the model"
"""The model's own dtype; for the cache, the dtype of the computation."""

SAME = "the same"
"""What deployment B of a comparison has in common with A."""

LARGEST = MAX_SIZE - 1

KV_HELP = (
    "What keys and values are kept in. transformers quantises with a QuantizedCache, of full "
    "attention only."
)

MODE_HELP = (
    "eager: one kernel at a time, as generate() does, which a busy host slows down. captured: the "
    "same kernels in a CUDA graph. graph: as the runtime makes its graphs; attnlab's are compiled."
)

CHOICES: dict[str, tuple[str, ...]] = {
    "model": tuple(planner.catalogue()),
    "gpu": tuple(planner.gpus()),
    "runtime": tuple(RUNTIMES),
    "dtype": (AS_MODEL, *COMPUTE_DTYPES),
    "kv_dtype": (AS_MODEL, *KV_DTYPES),
    "kv_backend": CACHE_BACKENDS,
    "logits": ("last", "all"),
    "mode": MODES,
    "workload": ("inference", "training"),
    "optimizer": (*OPTIMIZERS, "none"),
    "optimizer_impl": OPTIMIZER_IMPLS,
    "checkpointing": CHECKPOINTING,
    "precision": PRECISIONS,
    "shards": tuple(str(2**i) for i in range(11)),
    "shards_in": SHARD_DTYPES,
    "reduced_in": SHARD_DTYPES,
    "resharded": RESHARDED,
    "tp": tuple(str(2**i) for i in range(6)),
    "pp": tuple(str(i) for i in range(1, 9)),
    "b_gpu": (SAME, *planner.gpus()),
    "b_kv_dtype": (SAME, *KV_DTYPES),
    "b_tp": (SAME, *(str(2**i) for i in range(4))),
}
"""What a word in the URL may be."""

START = {
    "model": "llama-3.1-8b",
    "gpu": "h200",
    "runtime": "transformers",
    "dtype": AS_MODEL,
    "kv_dtype": AS_MODEL,
    "kv_backend": CACHE_BACKENDS[0],
    "kv_group": DEFAULT_GROUP_SIZE,
    "kv_residual": DEFAULT_RESIDUAL_TOKENS,
    "logits": "last",
    "mode": MODES[0],
    "workload": "inference",
    "optimizer": OPTIMIZERS[0],
    "optimizer_impl": OPTIMIZER_IMPLS[0],
    "checkpointing": "none",
    "checkpoint_every": 1,
    "precision": "pure",
    "shards": "1",
    "shards_in": SHARD_DTYPES[0],
    "reduced_in": SHARD_DTYPES[0],
    "resharded": RESHARDED[0],
    "tp": "1",
    "pp": "1",
    "batch": 8,
    "prompt": 2048,
    "output": 256,
    "sequence": 2048,
    "context": 8192,
    "b_gpu": SAME,
    "b_kv_dtype": "fp8",
    "b_tp": SAME,
}

NUMBERS = (
    "batch",
    "prompt",
    "output",
    "sequence",
    "context",
    "checkpoint_every",
    "kv_group",
    "kv_residual",
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
        if isinstance(work, planner.Training) and deploy.runtime == "transformers":
            deploy = _sharded(deploy)
        for problem in link_problems(asked, taken=st.session_state):
            problems.warning(problem)
    # last: a file that is no model must not take the other widgets off the page
    model = planner.load_model(named) if upload is None else uploaded(upload.name, upload.read())
    described.caption(("" if upload is None else f"{upload.name}: ") + in_words(model))
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
        return _training()
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


def _training() -> planner.Training:
    left, right = st.columns(2)
    with left:
        batch = number("Batch", "batch", help="Sequences at once.")
        optimizer = select("Optimizer", "optimizer")
    with right:
        sequence_tokens = number("Sequence tokens", "sequence", step=256)
        impl = select("Optimizer's way", "optimizer_impl", help="How torch goes through weights.")
    checkpointing = either(
        "Checkpointing",
        "checkpointing",
        "full: a layer keeps its input alone and is computed again on the way back. selective: but "
        "for its linear layers and attention.",
    )
    every = 1
    if checkpointing == "full":
        every = number("Every so many layers", "checkpoint_every", help="1: all of them.")
    precision = either(
        "Precision",
        "precision",
        "autocast: weights, gradients and states in fp32, products in bf16. master: weights and "
        "gradients in bf16, and fp32 copies that the optimizer steps. In fp16 both have a "
        "GradScaler.",
    )
    return planner.Training(
        batch=batch,
        sequence_tokens=sequence_tokens,
        optimizer=None if optimizer == "none" else optimizer,
        optimizer_impl=impl,  # type: ignore[arg-type]
        checkpointing=checkpointing,  # type: ignore[arg-type]
        checkpoint_every=every,
        precision=precision,  # type: ignore[arg-type]
    )


def _sharded(deploy: planner.Deployment) -> planner.Deployment:
    """The deployment among data-parallel GPUs, where it is."""
    shards = int(
        select(
            "Data-parallel shards",
            "shards",
            help="GPUs, a batch each, that weights, gradients and states are divided among: "
            "torch's fully_shard of every layer.",
        )
    )
    if shards == 1:
        return deploy
    left, right = st.columns(2)
    with left:
        kept = select(
            "Shards kept in", "shards_in", help="Gathered weights are of the dtype above."
        )
    with right:
        reduced = select("Gradients reduced in", "reduced_in")
    resharded = either(
        "Freed after the forward",
        "resharded",
        "Layers that are gathered again on the way back; the others stay until then.",
    )
    return replace(
        deploy,
        data_parallel_shards=shards,
        weight_dtype=kept,
        reduce_dtype=reduced,
        reshard_after_forward=resharded,  # type: ignore[arg-type]
    )


def either(label: str, key: str, help: str) -> str:
    """One of a few words of CHOICES."""
    chosen = st.segmented_control(
        label,
        CHOICES[key],
        default=START[key],
        required=True,
        width="stretch",
        key=key,
        bind="query-params",
        help=help,
    )
    return str(chosen or START[key])


def select(
    label: str, key: str, help: str | None = None, options: tuple[str, ...] | None = None
) -> str:
    """One of CHOICES, or of the options given."""
    options = options or CHOICES[key]
    start = str(START[key])
    chosen = st.selectbox(
        label,
        options,
        index=options.index(start) if start in options else 0,
        key=key,
        bind="query-params",
        help=help,
    )
    return str(chosen)


def number(label: str, key: str, *, step: int = 1, help: str | None = None) -> int:
    """A size, from START on."""

    def widget(key: str, *, bind: Literal["query-params"] | None) -> int:
        number = st.number_input(
            label,
            min_value=1,
            max_value=LARGEST,
            value=start,
            step=step,
            key=key,
            bind=bind,
            help=help,
        )
        return int(number)

    start = int(START[key])
    try:
        return widget(key, bind="query-params")
    except OverflowError:  # streamlit 1.67 takes int() of ?batch=inf; without the link it stands
        return widget(f"{key} apart from the link", bind=None)


def memories() -> str:
    """The catalogue's GPUs as a table."""
    lines = [f"| {g.name} | {g.label} | {gib(g.memory_bytes)} |" for g in planner.gpus().values()]
    return "\n".join(["| name | device | memory torch sees |", "|:--|:--|--:|", *lines])


def _is_size(text: str) -> bool:
    return text.isascii() and text.isdigit() and 1 <= int(text[:12]) <= LARGEST
