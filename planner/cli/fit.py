"""`planner fit` and `planner gpus`: how far a deployment goes and what would relax it; which GPUs
hold a workload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.capacity.answers import (
    Answer,
    gpu_ladder,
    largest_batch,
    longest_context,
    most_requests,
)
from planner.capacity.limits import smallest_layout
from planner.capacity.traffic import Traffic, fixed, lognormal, trace
from planner.catalog.gpus import gpu_named, gpus
from planner.cli.layout import (
    CudaGraphs,
    Eager,
    MaxBatchedTokens,
    MaxModelTokens,
    MaxSequences,
    PipelineParallel,
    TensorParallel,
    Utilization,
    launching,
    layout,
)
from planner.cli.options import (
    AsJson,
    Attention,
    Batch,
    Cache,
    Checkpointing,
    CsvFile,
    Dtype,
    GpuName,
    HostAdd,
    KvDtype,
    Logits,
    LoraRank,
    Method,
    Mode,
    ModelName,
    OptimizerName,
    Output,
    PowerLimit,
    Precision,
    Prompt,
    RuntimeName,
    SequenceTokens,
    Train,
    WeightDtype,
)
from planner.cli.output import exit_unless, show, show_table
from planner.errors import ConfigError
from planner.estimate import estimate
from planner.format import gib
from planner.loading import load_model
from planner.report import write_csv
from planner.result import Estimate
from planner.workload import LOW_RANK, Deployment, Inference, LoRA, Training, cache_spec


def fit_command(
    model: ModelName,
    gpu: GpuName,
    batch: Batch = 1,
    prompt: Prompt = 1024,
    output: Output = 1,
    runtime: RuntimeName = "transformers",
    dtype: Dtype = None,
    weight_dtype: WeightDtype = None,
    kv_dtype: KvDtype = None,
    cache: Cache = None,
    attention: Attention = None,
    logits: Logits = "all",
    tp: TensorParallel = 1,
    pp: PipelineParallel = 1,
    utilization: Utilization = 0.9,
    max_model_len: MaxModelTokens = None,
    max_batched: MaxBatchedTokens = None,
    max_seqs: MaxSequences = None,
    eager: Eager = False,
    cuda_graphs: CudaGraphs = "outside",
    mode: Mode = None,
    host_add: HostAdd = None,
    power_limit: PowerLimit = None,
    traffic: Annotated[
        str | None,
        typer.Option(
            "--traffic",
            metavar="CSV|fixed|lognormal:SIGMA[,SIGMA]",
            help="Also how many requests run at once: of a trace, all of --prompt and --output, or "
            "lognormal with these means and the standard deviations of their logarithms.",
        ),
    ] = None,
    train: Train = False,
    sequence: SequenceTokens = 1024,
    method: Method = "full",
    lora_rank: LoraRank = 8,
    optimizer: OptimizerName = "adamw",
    checkpointing: Checkpointing = "none",
    precision: Precision = "pure",
    as_json: AsJson = False,
) -> None:
    """The longest context, the largest batch, requests at once, the fewest GPUs. Exit 1 for none.

    Each with what ends it and what would relax it.
    """
    work: Inference | Training
    if train:
        if traffic is not None:
            raise ConfigError("--traffic is of requests, which training has none of: leave out one")
        work = Training(
            batch=batch,
            sequence_tokens=sequence,
            method=method,  # type: ignore[arg-type]
            lora=LoRA(rank=lora_rank) if method in LOW_RANK else None,
            optimizer=None if optimizer == "none" else optimizer,
            checkpointing=checkpointing,  # type: ignore[arg-type]
            precision=precision,  # type: ignore[arg-type]
        )
    else:
        work = Inference(
            batch=batch,
            prompt_tokens=prompt,
            output_tokens=output,
            logits=logits,  # type: ignore[arg-type]
        )
    deploy = Deployment(
        gpu=gpu,
        runtime=runtime,
        dtype=dtype,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
        cache=None if cache is None else cache_spec(cache),
        attention=attention,
        **layout(tp, pp, utilization, max_model_len, max_batched, max_seqs, cuda_graphs),
        **launching(mode, eager=eager, host_add=host_add, power_limit=power_limit),
    )
    described = load_model(model)
    result = estimate(described, work, deploy)
    longest, largest = (
        longest_context(described, work, deploy),
        largest_batch(described, work, deploy),
    )
    requests = None
    if traffic is not None:
        asked = _traffic(traffic, prompt, output, result.setting.longest_tokens)
        requests = most_requests(described, asked, deploy)
    smallest = smallest_layout(described, work, deploy)
    if as_json:
        answers = {"longest_context": longest, "largest_batch": largest, "requests": requests}
        show(
            {
                "model": described.name,
                "gpu": gpu,
                "runtime": runtime,
                "max_context_tokens": longest.value,
                "max_batch": largest.value,
                "max_concurrent_requests": None if requests is None else requests.value,
                "min_gpus": None if smallest is None else smallest.world_size,
                "fits": result.fits,
                "answers": {k: None if a is None else a.to_dict() for k, a in answers.items()},
            }
        )
    else:
        _tell(result, [a for a in (longest, largest, requests) if a is not None], smallest)
    exit_unless(bool(longest.value and largest.value))


def _tell(e: Estimate, answers: list[Answer], smallest: Deployment | None) -> None:
    lines = [f"{e.model.name} in {e.deploy.runtime} on {e.gpu.label}, {e.setting.attention}"]
    for answer in answers:
        lines += [f"  {line}" for line in answer.in_words.splitlines()]
    if smallest is None:
        lines.append(f"  fewest GPUs for {e.work.in_words}: no layout holds it")
    else:
        n, tp, pp = smallest.world_size, smallest.tensor_parallel, smallest.pipeline_parallel
        how = "" if n == 1 else f" (tensor parallel {tp}, pipeline parallel {pp})"
        lines.append(f"  fewest GPUs for {e.work.in_words}: {n}{how}")
    show("\n".join(lines))


def _traffic(text: str, prompt: int, output: int, longest_tokens: int | None) -> Traffic:
    """fixed, lognormal:σ or lognormal:σ,σ, else a CSV file."""
    if text == "fixed":
        return fixed(prompt, output)
    kind, _, given = text.partition(":")
    if kind == "lognormal":
        try:
            sigmas = [float(part) for part in given.split(",")]
        except ValueError:
            sigmas = []
        if len(sigmas) not in (1, 2):
            raise ConfigError(
                f"traffic={text!r} is not allowed: lognormal:SIGMA or lognormal:SIGMA,SIGMA"
            )
        return lognormal(
            prompt_mean=prompt,
            prompt_sigma=sigmas[0],
            output_mean=output,
            output_sigma=sigmas[-1],
            longest_tokens=longest_tokens,
        )
    return trace(Path(text))


def gpus_command(
    model: ModelName,
    batch: Batch = 1,
    prompt: Prompt = 1024,
    output: Output = 1,
    runtime: RuntimeName = "vllm",
    dtype: Dtype = None,
    weight_dtype: WeightDtype = None,
    kv_dtype: KvDtype = None,
    gpu: Annotated[
        list[str] | None, typer.Option("--gpu", help="Only these; may be repeated.")
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option("--price", metavar="GPU=PER_HOUR", help="What one costs; may be repeated."),
    ] = None,
    as_json: AsJson = False,
    csv: CsvFile = None,
) -> None:
    """The fewest of each GPU that hold the work, cheapest first. Exit 1 where none does."""
    work = Inference(batch=batch, prompt_tokens=prompt, output_tokens=output, logits="last")
    names = gpu or list(gpus())
    for name in names:
        gpu_named(name)
    deploy = Deployment(
        gpu=names[0],
        runtime=runtime,
        dtype=dtype,
        weight_dtype=weight_dtype,
        kv_dtype=kv_dtype,
    )
    prices = dict(_price(text) for text in price or ())
    table = gpu_ladder(load_model(model), work, deploy, names=names, price_per_hour=prices)
    if csv is not None:
        write_csv(table, csv)
    if as_json:
        plain = table.astype(object).where(table.notna(), None)
        show({"rows": plain.to_dict("records")})
    else:
        for column in ("bought_memory_bytes", "headroom_bytes"):
            table[column] = ["" if n is None or n != n else gib(int(n)) for n in table[column]]
        dull = [name for name in table.columns if table[name].isna().all()]
        show_table(table.drop(columns=dull).fillna(""), title=f"{model}: {work.in_words}")
    exit_unless(bool(table["gpus"].notna().any()))


def _price(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < float("inf"):
        raise ConfigError(f"price={text!r} is not understood: GPU=PER_HOUR, such as h200=3.50")
    return gpu_named(name).name, number
