"""Widgets whose choices are kept in the URL, and what each may be and begins with."""

from __future__ import annotations

from typing import Literal

import streamlit as st

import planner
from planner.dtypes import COMPUTE_DTYPES, KV_DTYPES
from planner.errors import MAX_SIZE
from planner.quantization.on_load import ON_LOAD
from planner.runtimes import RUNTIMES
from planner.runtimes.quantised_cache import DEFAULT_GROUP_SIZE, DEFAULT_RESIDUAL_TOKENS
from planner.workload import (
    CACHE_BACKENDS,
    CHECKPOINTING,
    METHODS,
    MODES,
    OPTIMIZER_IMPLS,
    OPTIMIZERS,
    PRECISIONS,
    RESHARDED,
    SHARD_DTYPES,
)

AS_MODEL = "as the model"
"""The model's own dtype; for the cache, the dtype of the computation."""

USUAL = "as usual"
"""As the runtime launches steps unless it is told otherwise."""

SAME = "the same"
"""What deployment B of a comparison has in common with A."""

LARGEST = MAX_SIZE - 1

CHOICES: dict[str, tuple[str, ...]] = {
    "model": tuple(planner.catalogue()),
    "gpu": tuple(planner.gpus()),
    "runtime": tuple(RUNTIMES),
    "dtype": (AS_MODEL, *COMPUTE_DTYPES),
    "kv_dtype": (AS_MODEL, *KV_DTYPES),
    "kv_backend": CACHE_BACKENDS,
    "logits": ("last", "all"),
    "mode": (USUAL, *MODES),
    "weights": (AS_MODEL, *dict.fromkeys(kept for made in ON_LOAD.values() for kept in made)),
    "routing": ("uniform", "balanced", "zipf:0.5", "zipf:1", "zipf:1.5"),
    "workload": ("inference", "training"),
    "method": METHODS,
    "adapters": ("LoRA", "DoRA"),
    "frozen_in": (AS_MODEL, "nf4", "nf4-double"),
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
    "mode": USUAL,
    "weights": AS_MODEL,
    "routing": "uniform",
    "workload": "inference",
    "method": METHODS[0],
    "rank": planner.LoRA().rank,
    "adapters": "LoRA",
    "frozen_in": AS_MODEL,
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
    "rate": 1,
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
    "rate",
    "checkpoint_every",
    "rank",
    "kv_group",
    "kv_residual",
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
