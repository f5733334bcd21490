"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.workload import FROZEN_PARTS, METHODS, OPTIMIZERS

TRAINING = "training"
"""The heading of what --train goes by."""

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Catalogue name, config.json or its folder, .gguf file, hf:org/name."
    ),
]
GpuName = Annotated[
    str, typer.Option("--gpu", help="Short name, such as h200 or cpu; auto: the card that is here.")
]
Batch = Annotated[int, typer.Option("--batch", help="Sequences at once.")]
Prompt = Annotated[int, typer.Option("--prompt", help="Prompt tokens of each sequence.")]
Output = Annotated[int, typer.Option("--output", help="Output tokens of each sequence.")]
EncoderTokens = Annotated[
    int | None, typer.Option("--encoder-tokens", help="What an encoder reads beside a decoder.")
]
RuntimeName = Annotated[
    str,
    typer.Option("--runtime", help="transformers, attnlab, vllm, llama.cpp, litgpt, torchtune."),
]
Mode = Annotated[
    str | None,
    typer.Option(
        "--mode",
        help="How steps are launched: eager; captured, the same kernels in a CUDA graph; graph "
        "(the default), as the runtime makes its graphs (attnlab's are compiled).",
    ),
]
HostAdd = Annotated[
    float | None,
    typer.Option(
        "--host-add",
        metavar="SECONDS",
        help="How fast the host launches: what x + x over 64 elements costs it, 7e-6; eager only.",
    ),
]
PowerLimit = Annotated[
    float | None,
    typer.Option(
        "--power-limit",
        metavar="WATTS",
        help="What each GPU is held to (nvidia-smi -pl); else its TDP.",
    ),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="fp32, bf16 or fp16; else the model's.")]
WeightDtype = Annotated[
    str | None,
    typer.Option("--weight-dtype", help="Quantised on loading: fp8, int8, nf4, nf4-double."),
]
KvDtype = Annotated[
    str | None, typer.Option("--kv-dtype", help="The cache's: fp8, int8, int4, …; else as --dtype.")
]
Cache = Annotated[
    str | None,
    typer.Option(
        "--cache",
        metavar="KIND[:FIELD=VALUE,…]",
        help="Kind of cache, else the runtime's own: quantised:backend=hqq,q_group_size=32",
    ),
]
Attention = Annotated[str | None, typer.Option("--attention", help="Backend; else the default.")]
Train = Annotated[
    bool,
    typer.Option("--train", help="A training step, not an inference.", rich_help_panel=TRAINING),
]
SequenceTokens = Annotated[
    int, typer.Option("--sequence", help="Tokens of a sequence.", rich_help_panel=TRAINING)
]
OptimizerName = Annotated[
    str,
    typer.Option(
        "--optimizer", help=f"{', '.join(OPTIMIZERS)}, none (no step).", rich_help_panel=TRAINING
    ),
]
OptimizerImpl = Annotated[
    str,
    typer.Option("--optimizer-impl", help="foreach, fused or for-loop.", rich_help_panel=TRAINING),
]
Checkpointing = Annotated[
    str, typer.Option("--checkpointing", help="none, full or selective.", rich_help_panel=TRAINING)
]
CheckpointEvery = Annotated[
    int,
    typer.Option(
        "--checkpoint-every",
        help="Full checkpointing of every so many-th layer.",
        rich_help_panel=TRAINING,
    ),
]
KeepEvery = Annotated[
    int,
    typer.Option(
        "--keep-every",
        help="Selective checkpointing of every so many-th product.",
        rich_help_panel=TRAINING,
    ),
]
LossChunk = Annotated[
    int | None,
    typer.Option(
        "--loss-chunk",
        help="Tokens whose logits and loss come at a time.",
        rich_help_panel=TRAINING,
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        help="pure, autocast, or master (the optimizer steps fp32 copies); in fp16 "
        "the last two with torch's GradScaler.",
        rich_help_panel=TRAINING,
    ),
]
Padded = Annotated[
    bool, typer.Option("--padded", help="Sequences differ in length: an attention mask is given.")
]
Float32Logits = Annotated[
    bool, typer.Option("--float32-logits", help="All logits are cast: transformers before 4.46.")
]
Accumulation = Annotated[
    int,
    typer.Option(
        "--accumulation",
        help="Batches whose gradients are added up in a step.",
        rich_help_panel=TRAINING,
    ),
]
Frozen = Annotated[
    str | None,
    typer.Option(
        "--frozen",
        metavar="PART[,PART]",
        help=f"Of method full: parts that are not trained: {', '.join(FROZEN_PARTS)}.",
        rich_help_panel=TRAINING,
    ),
]
FrozenLayers = Annotated[
    int,
    typer.Option(
        "--frozen-layers", help="The same of the first so many layers.", rich_help_panel=TRAINING
    ),
]
Method = Annotated[
    str, typer.Option("--method", help=f"{', '.join(METHODS)}.", rich_help_panel=TRAINING)
]
LoraRank = Annotated[
    int, typer.Option("--lora-rank", help="Rank of the adapters.", rich_help_panel=TRAINING)
]
LoraTargets = Annotated[
    str,
    typer.Option(
        "--lora-targets",
        help="all-linear, or names of modules: q_proj,v_proj",
        rich_help_panel=TRAINING,
    ),
]
LoraDtype = Annotated[
    str | None,
    typer.Option(
        "--lora-dtype",
        help="The adapters'; else fp32, as peft does, or the model's.",
        rich_help_panel=TRAINING,
    ),
]
Dora = Annotated[
    bool,
    typer.Option(
        "--dora",
        help="Adapters have magnitudes, too: peft's use_dora=True.",
        rich_help_panel=TRAINING,
    ),
]
RoutingOf = Annotated[
    str,
    typer.Option(
        "--routing",
        metavar="uniform|balanced|zipf:SKEW",
        help="How a mixture's tokens pick experts: at random, dealt out in turn, or by a "
        "popularity that falls as rank^-SKEW. Times alone depend on it.",
    ),
]
Logits = Annotated[str, typer.Option("--logits", help="all (a forward) or last (generate).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Traced = Annotated[
    bool, typer.Option("--traced", help="Read it off transformers' class: any type it knows.")
]
Files = Annotated[
    bool,
    typer.Option("--files", help="What lies in the weight files beside the config."),
]
CsvFile = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write a table.")]
