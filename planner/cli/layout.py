"""Options of `planner estimate` and `planner fit` that say how vllm, or training, is laid out."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from planner.errors import ConfigError, shown

TensorParallel = Annotated[
    int, typer.Option("--tp", help="GPUs that share each layer (vllm).", rich_help_panel="vllm")
]
PipelineParallel = Annotated[
    int,
    typer.Option("--pp", help="Stages of layers, each on its own GPUs.", rich_help_panel="vllm"),
]
Utilization = Annotated[
    float,
    typer.Option(
        "--gpu-memory-utilization", help="Share of the memory it takes.", rich_help_panel="vllm"
    ),
]
MaxModelTokens = Annotated[
    int | None,
    typer.Option("--max-model-len", help="Longest sequence served.", rich_help_panel="vllm"),
]
MaxBatchedTokens = Annotated[
    int | None,
    typer.Option("--max-num-batched-tokens", help="Tokens of a pass.", rich_help_panel="vllm"),
]
MaxSequences = Annotated[
    int | None,
    typer.Option("--max-num-seqs", help="Sequences at once.", rich_help_panel="vllm"),
]
CudaGraphs = Annotated[
    str,
    typer.Option(
        "--cuda-graphs",
        help="outside or (since 0.21) inside the budget of the pool.",
        rich_help_panel="vllm",
    ),
]
Eager = Annotated[
    bool,
    typer.Option("--enforce-eager", help="Without CUDA graphs.", rich_help_panel="vllm"),
]

Shards = Annotated[
    int,
    typer.Option(
        "--shards",
        help="GPUs that training divides weights, gradients and states among.",
        rich_help_panel="fully_shard",
    ),
]
Reshard = Annotated[
    str,
    typer.Option(
        "--reshard",
        help="Layers freed after the forward: all, all-but-last, none.",
        rich_help_panel="fully_shard",
    ),
]
ReduceDtype = Annotated[
    str,
    typer.Option(
        "--reduce-dtype", help="Gradients are reduced in it.", rich_help_panel="fully_shard"
    ),
]


def sharding(shards: int, reshard: str, reduce_dtype: str) -> dict[str, Any]:
    """How training is sharded, as fields of a Deployment."""
    return {
        "data_parallel_shards": shards,
        "reshard_after_forward": reshard,
        "reduce_dtype": reduce_dtype,
    }


def layout(
    tp: int,
    pp: int,
    utilization: float,
    max_model_len: int | None,
    max_batched: int | None,
    max_seqs: int | None,
    cuda_graphs: str,
) -> dict[str, Any]:
    """These options as the fields of a Deployment."""
    return {
        "tensor_parallel": tp,
        "pipeline_parallel": pp,
        "memory_utilization": utilization,
        "max_model_tokens": max_model_len,
        "max_batched_tokens": max_batched,
        "max_sequences": max_seqs,
        "cuda_graphs": cuda_graphs,
    }


def launching(
    mode: str | None, *, eager: bool, host_add: float | None, power_limit: float | None
) -> dict[str, Any]:
    """How steps are launched, at which power, as fields of a Deployment; `eager` is vllm's word."""
    if eager and mode not in (None, "eager"):
        raise ConfigError(f"--mode {shown(mode)} is not allowed with --enforce-eager: eager")
    taken = "eager" if eager else mode or "graph"
    if host_add is not None and taken != "eager":
        raise ConfigError(
            f"--host-add is not allowed with --mode {taken}: a graph waits for no host"
        )
    return {"mode": taken, "host_add_s": host_add, "power_limit_w": power_limit}
