"""How a training step goes: what is trained, kept, and divided among GPUs."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

import planner
from app.widgets import CHOICES, either, number, select
from planner.workload import LOW_RANK

BESIDE_FOUR_BITS = ("transformers", "litgpt")
"""Runtimes that train adapters beside weights of 4 bits."""


def training(runtime: str) -> planner.Training:
    """The step that the widgets describe."""
    method = select(
        "Method",
        "method",
        "full: all weights are trained. lora, qlora: low-rank adapters beside frozen ones, with "
        "qlora of 4 bits and prepared by peft. adapter: LLaMA-Adapter's.",
    )
    lora = _adapters(runtime) if method in LOW_RANK else None
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
        method=method,  # type: ignore[arg-type]
        lora=lora,
        optimizer=None if optimizer == "none" else optimizer,
        optimizer_impl=impl,  # type: ignore[arg-type]
        checkpointing=checkpointing,  # type: ignore[arg-type]
        checkpoint_every=every,
        precision=precision,  # type: ignore[arg-type]
    )


def _adapters(runtime: str) -> planner.LoRA:
    rank = number("LoRA rank", "rank", help="Of every adapter.")
    if runtime != "transformers":
        return planner.LoRA(rank=rank)
    kind = either("Adapters", "adapters", "DoRA: with a magnitude for every row of the weight.")
    return planner.LoRA(rank=rank, dora=kind == "DoRA")


def beside(work: planner.Training, deploy: planner.Deployment) -> planner.Deployment:
    """The deployment with frozen weights as they lie beside adapters."""
    if work.adapters is None or deploy.runtime not in BESIDE_FOUR_BITS:
        return deploy
    offered = CHOICES["frozen_in"][work.method == "qlora" :]
    kept = select("Frozen weights in", "frozen_in", "nf4: bitsandbytes' 4 bits.", offered)
    return deploy if kept == CHOICES["frozen_in"][0] else replace(deploy, weight_dtype=kept)


def sharded(deploy: planner.Deployment) -> planner.Deployment:
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
