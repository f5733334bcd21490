"""Options of `planner estimate` and `planner fit` that say how vllm is started."""

from __future__ import annotations

from typing import Annotated

import typer

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
Eager = Annotated[
    bool,
    typer.Option("--enforce-eager", help="Without CUDA graphs.", rich_help_panel="vllm"),
]
