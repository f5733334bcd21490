"""Grids of estimates: every combination of models, GPUs and settings, over batches and contexts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import check_kind, check_size
from planner.model import Model
from planner.routing import UNIFORM, Routing
from planner.sweeps.cells import combinations, evaluated, listed, sizes
from planner.sweeps.tables import to_file, to_frame

if TYPE_CHECKING:
    import pandas as pd


def sweep(
    models: Iterable[str | Model] | str | Model,
    gpus: Iterable[str] | str,
    batch: Iterable[int] | int,
    context_tokens: Iterable[int] | int,
    *,
    output_tokens: int = 1,
    runtime: Iterable[str] | str = ("vllm",),
    dtype: Iterable[str | None] | str | None = (None,),
    kv_dtype: Iterable[str | None] | str | None = (None,),
    tensor_parallel: Iterable[int] | int = (1,),
    pipeline_parallel: Iterable[int] | int = (1,),
    latency: bool = False,
    routing: Routing = UNIFORM,
    to: str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> pd.DataFrame | Path:
    """A row for every combination: labels (categorical), sizes, bytes of one GPU, whether it fits.

    `context_tokens` is the KV length at the end, prompt + output − 1. Each row equals `estimate` of
    Inference(batch, prompt, output_tokens, logits="last"). A row that an estimate would refuse has
    no numbers, and the reason in `refused`. `latency` adds TTFT, TPOT and tokens/s, of mixtures by
    this `routing`. `to` streams to a .csv or .parquet file in constant memory and returns its path;
    `on_progress` is told cells done and cells in all.

    Raises ConfigError for names and sizes that are not allowed, and for a file that cannot be
    written.
    """
    check_size("output_tokens", output_tokens)
    if to is not None:
        check_kind("to", to, str, Path)
    batches, contexts = sizes("batch", batch), sizes("context_tokens", context_tokens)
    every = combinations(
        models,
        gpus,
        runtime=listed(runtime),
        dtype=listed(dtype),
        kv_dtype=listed(kv_dtype),
        tensor_parallel=listed(tensor_parallel),
        pipeline_parallel=listed(pipeline_parallel),
    )
    blocks = evaluated(
        every,
        batches,
        contexts,
        output_tokens=output_tokens,
        latency=latency,
        routing=routing,
        tell=on_progress,
    )
    if to is None:
        return to_frame(list(blocks), latency=latency)
    return to_file(blocks, Path(to), latency=latency)
