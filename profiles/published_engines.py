"""How a published latency was run, as the planner is asked for it: an engine's name → a plan.

No constant was fitted on these rows. An engine that is no runtime of ours is planned as the nearest
one, which the row names. What nothing here can express says why.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import planner
from planner.timing.collectives import MEASURED
from planner.timing.latency import UNTIMED

GPUS = {
    "A100-SXM4-80GB": "a100-80gb",
    "A100-80GB": "a100-80gb",
    "A100-80GB (power-limited 330W, hybrid cube mesh)": "a100-80gb",
    "H100-SXM-80GB": "h100-80gb",
    "H200-SXM-141GB": "h200",
    "L40S": "l40s",
    "B200": "b200",
    "MI300X": "mi300x",
    "H100-96GB HBM2e, 500 W": "h100-96gb-hbm2e",
}
MODELS = {
    "NousResearch/Llama-2-7b-hf": "llama-2-7b",
    "NousResearch/Llama-2-13b-hf": "llama-2-13b",
    "lmsys/vicuna-7b-v1.5": "llama-2-7b",
    "mistralai/Mistral-7B-v0.1": "mistral-7b-v0.1",
    "Llama-2-7b": "llama-2-7b",
    "Llama-2-70b": "llama-2-70b",
    "Llama-2-7b-chat": "llama-2-7b",
    "Llama-2-70b-chat": "llama-2-70b",
    "Llama-3-8B": "llama-3-8b",
    "Llama-3.1-8B": "llama-3.1-8b",
    "Llama-3.1-70B": "llama-3.1-70b",
    "Llama-3.1-405B": "llama-3.1-405b",
    "Mixtral-8x7B-v0.1": "mixtral-8x7b",
    "LLaMA 7B": "llama-2-7b",
    "LLaMA 70B": "llama-2-70b",
    "Mistral 7B": "mistral-7b-v0.1",
    "GPT-J 6B": "gpt-j-6b",
}
"""Vicuna is Llama-2 finetuned; TensorRT-LLM's configurations are Llama-2's (performance.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyPlan:
    """A published run as the planner is asked for it; `planned_as` in words."""

    model: planner.Model
    work: planner.Inference | planner.Training
    deploy: planner.Deployment
    planned_as: str


def plan_of(record: dict[str, Any]) -> LatencyPlan:
    """Raises ConfigError for what nothing here can express."""
    return PLANNERS[engine_of(record)](record)


def engine_of(record: dict[str, Any]) -> str:
    """The engine's name, without version."""
    return str(record["engine"]).split()[0]


def _work(record: dict[str, Any], **settings: Any) -> planner.Inference:
    return planner.Inference(
        batch=record["batch"],
        prompt_tokens=record["prompt"],
        output_tokens=record["output"],
        **settings,
    )


def _transformers(record: dict[str, Any]) -> LatencyPlan:
    """Forwards over all logits, in float32, op by op.

    A mask of ones is added to eager scores; flash attention is given none (modeling_llama.py).
    """
    attention = "eager" if record["attention"] == "eager" else "sdpa"
    return LatencyPlan(
        model=planner.load_model(MODELS[record["model"]]),
        work=_work(record, logits="all", padded=attention == "eager", float32_logits=True),
        deploy=planner.Deployment(
            gpu=GPUS[record["gpu"]], dtype="fp16", attention=attention, mode="eager"
        ),
        planned_as=f"transformers 5.23, {attention} attention, op by op",
    )


def _gpt_fast(record: dict[str, Any]) -> LatencyPlan:
    """A compiled model in a CUDA graph, weights as quantize.py leaves them."""
    dtype, n = str(record["dtype"]), record["gpus"]
    said = ["attnlab, graph"]
    if "330W" in record["gpu"]:
        said.append("at full power")
    if "groups of 64" in dtype:
        said.append("groups of 32")
    return LatencyPlan(
        model=planner.load_model(MODELS[record["model"]]),
        work=_work(record),
        deploy=planner.Deployment(
            gpu=GPUS[record["gpu"]],
            gpus=n,
            runtime="attnlab",
            dtype="bf16",
            weight_dtype=None if dtype == "bf16" else dtype.split()[0],
            tensor_parallel=n,
        ),
        planned_as=", ".join(said),
    )


def _static_batch(record: dict[str, Any]) -> LatencyPlan:
    """An engine with a paged cache and fused kernels: all prompts in one pass, then steps."""
    n, in_fp8 = record["gpus"], "fp8" in record["dtype"]
    prompts = record["batch"] * record["prompt"]
    return LatencyPlan(
        model=planner.load_model(MODELS[record["model"]]),
        work=_work(record, logits="last"),
        deploy=planner.Deployment(
            gpu=GPUS[record["gpu"]],
            gpus=n,
            runtime="vllm",
            dtype="fp16",
            weight_dtype="fp8" if in_fp8 else None,
            kv_dtype="fp8" if in_fp8 and "cache" in record["dtype"] else None,
            tensor_parallel=n,
            max_batched_tokens=max(prompts, record["batch"], 2048),
            max_sequences=record["batch"],
        ),
        planned_as="vllm, as the nearest engine",
    )


def _vllm(record: dict[str, Any]) -> LatencyPlan:
    """`vllm bench throughput` or `latency`: all requests at once, LLM's defaults."""
    amd = record["gpu"].startswith("MI")
    return LatencyPlan(
        model=planner.load_model(MODELS[record["model"]]),
        work=_work(record, logits="last"),
        deploy=planner.Deployment(
            gpu=GPUS[record["gpu"]],
            gpus=record["gpus"],
            runtime="vllm",
            dtype="fp16" if amd else "bf16",
            weight_dtype="fp8" if record["dtype"].startswith(("fp8", "float8")) else None,
            tensor_parallel=record["gpus"],
            max_batched_tokens=16384,
        ),
        planned_as="vllm 0.19" + (", uncalibrated" if amd else ""),
    )


def _torchtitan(record: dict[str, Any]) -> LatencyPlan:
    """Its own Llama under fully_shard, as its memory is planned (published.py: _torchtitan)."""
    if "Float8" in record["notes"]:
        raise planner.ConfigError("training with products in float8 is not planned")
    n = record["gpus"]
    if n > max(MEASURED):
        raise planner.ConfigError(f"data_parallel_shards={n}: times {UNTIMED}")
    compiled = "compile" in record["notes"]
    return LatencyPlan(
        model=planner.load_model(MODELS[record["model"]]),
        work=planner.Training(
            batch=record["batch"],
            sequence_tokens=record["prompt"],
            checkpointing="selective",
            keep_every=2,
        ),
        deploy=planner.Deployment(
            gpu=GPUS[record["gpu"]],
            dtype="bf16",
            weight_dtype="fp32",
            data_parallel_shards=n,
            reshard_after_forward="all-but-last",
            power_limit_w=500,
        ),
        planned_as="transformers under fully_shard" + (", uncompiled" if compiled else ""),
    )


PLANNERS: dict[str, Callable[[dict[str, Any]], LatencyPlan]] = {
    "transformers": _transformers,
    "gpt-fast": _gpt_fast,
    "torchao": _gpt_fast,
    "TensorRT-LLM": _static_batch,
    "LMDeploy": _static_batch,
    "vLLM": _vllm,
    "torchtitan": _torchtitan,
}
