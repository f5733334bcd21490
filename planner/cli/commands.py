"""`planner …`: the API from a shell. Exit codes: 0 done, 1 the answer is no, 2 bad input.

The one file of planner that reaches for the measuring side, and only inside those commands.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.calibrate import calibrate_command
from planner.cli.check import check_command
from planner.cli.compare import compare_command
from planner.cli.explain_log import explain_log_command
from planner.cli.fit import fit_command, gpus_command
from planner.cli.layout import (
    CudaGraphs,
    Eager,
    MaxBatchedTokens,
    MaxModelTokens,
    MaxSequences,
    PipelineParallel,
    ReduceDtype,
    Reshard,
    Shards,
    TensorParallel,
    Utilization,
    launching,
    layout,
    sharding,
)
from planner.cli.options import (
    Accumulation,
    AsJson,
    Attention,
    Batch,
    Cache,
    CheckpointEvery,
    Checkpointing,
    CsvFile,
    Dora,
    Dtype,
    EncoderTokens,
    Files,
    Float32Logits,
    Frozen,
    FrozenLayers,
    GpuName,
    HostAdd,
    KeepEvery,
    KvDtype,
    Logits,
    LoraDtype,
    LoraRank,
    LoraTargets,
    LossChunk,
    Method,
    Mode,
    ModelName,
    OptimizerImpl,
    OptimizerName,
    Output,
    Padded,
    PowerLimit,
    Precision,
    Prompt,
    RoutingOf,
    RuntimeName,
    SequenceTokens,
    Traced,
    Train,
    WeightDtype,
)
from planner.cli.output import exit_unless, refuse, show, show_table
from planner.cli.profile import profile_command
from planner.cli.report import report_command
from planner.cli.schema import schema_command
from planner.cli.sweep import diff_command, sweep_command
from planner.cli.trace import trace_command
from planner.errors import ConfigError
from planner.estimate import estimate
from planner.format import gib
from planner.loading import load_config, load_model
from planner.report import write_csv
from planner.result import Estimate
from planner.routing import routing_spec
from planner.workload import ALL_LINEAR, LOW_RANK, Deployment, Inference, LoRA, Training, cache_spec

if TYPE_CHECKING:
    from profiles.traced_estimate import TracedEstimate  # noqa: TID251

# typer carries its own copy of click since 0.26 and used the installed one before
_WRONG_USAGE: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

PLAN, MEASURE, BESIDES = "Plan and check", "Measure and compare", "Besides"
"""Headings of the list of commands."""

EXAMPLES = """Examples

planner estimate llama-3.1-8b --gpu h200 --batch 8 --prompt 8192 --output 512

planner fit llama-3.1-70b --gpu h100-80gb --tp 2 --runtime vllm --weight-dtype fp8

planner fit qwen2.5-7b --gpu rtx-4090 --train --method lora --checkpointing full

planner gpus llama-3.1-70b --batch 16 --prompt 4096 --price h200=3.5 --price l40s=0.9
"""

app = typer.Typer(
    name="planner",
    help="Predict what a transformer holds and how fast it runs; measure it; compare.",
    epilog=EXAMPLES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("estimate", rich_help_panel=PLAN)
def estimate_command(
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
    shards: Shards = 1,
    reshard: Reshard = "all",
    reduce_dtype: ReduceDtype = "fp32",
    train: Train = False,
    sequence: SequenceTokens = 1024,
    optimizer: OptimizerName = "adamw",
    optimizer_impl: OptimizerImpl = "foreach",
    checkpointing: Checkpointing = "none",
    checkpoint_every: CheckpointEvery = 1,
    keep_every: KeepEvery = 1,
    loss_chunk: LossChunk = None,
    precision: Precision = "pure",
    accumulation: Accumulation = 1,
    frozen: Frozen = None,
    frozen_layers: FrozenLayers = 0,
    method: Method = "full",
    lora_rank: LoraRank = 8,
    lora_targets: LoraTargets = ALL_LINEAR,
    lora_dtype: LoraDtype = None,
    dora: Dora = False,
    encoder_tokens: EncoderTokens = None,
    padded: Padded = False,
    float32_logits: Float32Logits = False,
    routing: RoutingOf = "uniform",
    traced: Traced = False,
    as_json: AsJson = False,
    csv: CsvFile = None,
) -> None:
    """Memory and latency of a workload, part by part. Exit 1 if it does not fit."""
    work: Inference | Training
    if train:
        work = Training(
            batch=batch,
            sequence_tokens=sequence,
            optimizer=None if optimizer == "none" else optimizer,
            optimizer_impl=optimizer_impl,  # type: ignore[arg-type]
            checkpointing=checkpointing,  # type: ignore[arg-type]
            checkpoint_every=checkpoint_every,
            keep_every=keep_every,
            loss_chunk_tokens=loss_chunk,
            precision=precision,  # type: ignore[arg-type]
            padded=padded,
            accumulation_steps=accumulation,
            frozen=() if frozen is None else tuple(frozen.split(",")),
            frozen_layers=frozen_layers,
            method=method,  # type: ignore[arg-type]
            lora=_lora(method, lora_rank, lora_targets, lora_dtype, dora=dora),
            encoder_tokens=encoder_tokens,
            routing=routing_spec(routing),
        )
    else:
        work = Inference(
            batch=batch,
            prompt_tokens=prompt,
            output_tokens=output,
            logits=logits,  # type: ignore[arg-type]
            encoder_tokens=encoder_tokens,
            padded=padded,
            float32_logits=float32_logits,
            routing=routing_spec(routing),
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
        **sharding(shards, reshard, reduce_dtype),
    )
    result: Estimate | TracedEstimate
    if traced:
        from profiles.trace import trace  # noqa: TID251
        from profiles.traced_estimate import traced_estimate  # noqa: TID251

        if isinstance(work, Training):
            raise ConfigError("--train is not traced: leave out --traced")
        name, config = load_config(model)
        result = traced_estimate(trace(config, name=name), work, deploy)
    else:
        result = estimate(load_model(model), work, deploy)
    if csv is not None:
        result.to_csv(csv)
    show(result.to_dict() if as_json else result.explain())
    exit_unless(result.fits)


def _lora(method: str, rank: int, targets: str, dtype: str | None, *, dora: bool) -> LoRA | None:
    if method not in LOW_RANK and not dora:
        return None
    named = targets if targets == ALL_LINEAR else tuple(targets.split(","))
    return LoRA(rank=rank, targets=named, dtype=dtype, dora=dora)


@app.command("params", rich_help_panel=PLAN)
def params_command(
    model: ModelName,
    traced: Traced = False,
    files: Files = False,
    as_json: AsJson = False,
    csv: CsvFile = None,
) -> None:
    """The parameter table: name, group, layer, shape, count of every trained tensor.

    --files: exact bytes and dtypes of the weight files instead. Exit 1 if they do not fit.
    """
    if files:
        _print_files(model, as_json=as_json, csv=csv)
        return
    if traced:
        _print_traced(model, as_json=as_json, csv=csv)
        return
    described = load_model(model)
    table = described.parameter_table()
    if csv is not None:
        write_csv(table, csv)
    if as_json:
        show(
            {
                "model": described.name,
                "parameter_count": described.parameter_count,
                "active_parameter_count": described.active_parameter_count,
                "parameters": [
                    {
                        "name": p.name,
                        "group": p.group,
                        "layer": p.layer,
                        "shape": list(p.shape),
                        "count": p.count,
                    }
                    for p in described.checkpoint_parameters()
                ],
            }
        )
        return
    show_table(table, title=f"{described.name}: {described.parameter_count:,} parameters")


app.command("check", rich_help_panel=PLAN)(check_command)
app.command("fit", rich_help_panel=PLAN)(fit_command)
app.command("gpus", rich_help_panel=PLAN)(gpus_command)
app.command("sweep", rich_help_panel=PLAN)(sweep_command)
app.command("diff", rich_help_panel=PLAN)(diff_command)
app.command("report", rich_help_panel=PLAN)(report_command)
app.command("schema", rich_help_panel=BESIDES)(schema_command)
app.command("trace", rich_help_panel=MEASURE)(trace_command)
app.command("profile", rich_help_panel=MEASURE)(profile_command)
app.command("compare", rich_help_panel=MEASURE)(compare_command)
app.command("calibrate", rich_help_panel=MEASURE)(calibrate_command)
app.command("explain-log", rich_help_panel=MEASURE)(explain_log_command)


@app.command("app", rich_help_panel=BESIDES)
def app_command(
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Where to serve.")] = 8501,
) -> None:
    """Open the dashboard (from a checkout)."""
    import subprocess

    main_file = Path(__file__).parents[2] / "app" / "main.py"
    if not main_file.is_file():
        raise ConfigError(
            "the dashboard runs from a checkout of the project: app/main.py is absent"
        )
    command = [sys.executable, "-m", "streamlit", "run", str(main_file)]
    raise typer.Exit(
        subprocess.call([*command, "--server.port", str(port)], cwd=main_file.parents[1])
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: a ConfigError or a wrong option is one line on stderr and exit code 2."""
    try:
        code = app(args=arguments, standalone_mode=False)
    except ConfigError as error:
        code = refuse(str(error))
    except typer.Abort:
        code = refuse("interrupted")
    except _WRONG_USAGE as error:
        message = error.format_message()  # empty where the help was asked for by saying nothing
        code = refuse(message) if message else 0
    except KeyboardInterrupt:
        code = refuse("interrupted; what was measured before is kept")
    except BrokenPipeError:
        code = 0
    except OSError as error:  # a full disk, under what is printed
        code = refuse(f"the answer cannot be written: {error.strerror or error}")
    raise SystemExit(code or 0)


def _print_traced(model: str, *, as_json: bool, csv: Path | None) -> None:
    from profiles.trace import trace  # noqa: TID251

    name, config = load_config(model)
    found = trace(config)
    table = found.parameter_table()
    if csv is not None:
        write_csv(table, csv)
    title = (
        f"{name}: {found.parameter_count:,} parameters, traced from {found.class_name} of "
        f"transformers {found.transformers}"
    )
    if as_json:
        rows = [{"name": n, "shape": list(shape)} for n, shape in found.shapes]
        answer = {"model": name, "traced": True, "parameter_count": found.parameter_count}
        show({**answer, "parameters": rows})
    else:
        show_table(table, title=title)


def _print_files(source: str, *, as_json: bool, csv: Path | None) -> None:
    from planner.checkpoints.checkpoint import compare_files

    checkpoint, findings = compare_files(source)
    mix = checkpoint.dtype_mix()
    if csv is not None:
        write_csv(checkpoint.table(), csv)
    if as_json:
        answer = {
            "path": checkpoint.path,
            "kind": checkpoint.kind,
            "files": checkpoint.files,
            "weights_bytes": checkpoint.weights_bytes,
            "dtypes": [asdict(share) for share in mix],
            "findings": [asdict(finding) for finding in findings],
            "tensors": [asdict(tensor) for tensor in checkpoint.tensors],
        }
        show(answer)
    else:
        show(
            f"{checkpoint.path}: {len(checkpoint.tensors):,} tensors in "
            f"{len(checkpoint.files):,} {checkpoint.kind} files, "
            f"{checkpoint.weights_bytes:,} bytes ({gib(checkpoint.weights_bytes)})"
        )
        for share in mix:
            show(
                f"  {share.dtype:8} {share.tensors:7,} tensors {share.elements:18,} elements "
                f"{share.size_bytes:18,} bytes"
            )
        for f in findings:
            show(f"{f.severity}: {f.title}\n  {f.seen}\n  {f.why} {f.do}".rstrip())
        if not findings:
            show("The files hold what the config says.")
    exit_unless(all(finding.severity != "error" for finding in findings))


if __name__ == "__main__":
    main()
