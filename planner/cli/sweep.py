"""`planner sweep` and `planner diff`: many estimates in one table, and two of them compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.capacity.answers import what_if
from planner.cli.options import (
    AsJson,
    Batch,
    CsvFile,
    Dtype,
    GpuName,
    KvDtype,
    ModelName,
    Output,
    Prompt,
    RoutingOf,
    RuntimeName,
)
from planner.cli.output import show, show_table
from planner.cli.report import records
from planner.errors import ConfigError, shown
from planner.estimate import estimate
from planner.format import gib
from planner.loading import load_model
from planner.report import write_csv
from planner.routing import routing_spec
from planner.sweeps.sweep import sweep
from planner.workload import Deployment, Inference

MAX_SHOWN = 40
MAX_VALUES = 100_000


def sweep_command(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="One or several.")],
    gpu: Annotated[list[str], typer.Option("--gpu", help="Short name; may be repeated.")],
    batch: Annotated[
        str, typer.Option("--batch", help="Numbers and ranges: 1,8,64 or 1:256 or 1:256:5.")
    ] = "1",
    context: Annotated[
        str, typer.Option("--context", help="KV length at the end, in the same way.")
    ] = "1024",
    output: Output = 1,
    runtime: Annotated[
        list[str] | None, typer.Option("--runtime", help="May be repeated; else vllm.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help="May be repeated; else the model's.")
    ] = None,
    kv_dtype: Annotated[
        list[str] | None, typer.Option("--kv-dtype", help="May be repeated; else as --dtype.")
    ] = None,
    tp: Annotated[list[int] | None, typer.Option("--tp", help="May be repeated (vllm).")] = None,
    pp: Annotated[list[int] | None, typer.Option("--pp", help="May be repeated (vllm).")] = None,
    latency: Annotated[bool, typer.Option("--latency", help="TTFT, TPOT, tokens/s.")] = False,
    routing: RoutingOf = "uniform",
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE", help="Stream to .csv or .parquet, any size."),
    ] = None,
    as_json: AsJson = False,
    csv: CsvFile = None,
) -> None:
    """Every combination over batches × contexts, a row each. What is refused says why."""
    settings: dict[str, Any] = {
        "output_tokens": output,
        "runtime": runtime or ["vllm"],
        "dtype": dtype or [None],
        "kv_dtype": kv_dtype or [None],
        "tensor_parallel": tp or [1],
        "pipeline_parallel": pp or [1],
        "latency": latency,
        "routing": routing_spec(routing),
    }
    sizes = numbers("batch", batch), numbers("context", context)
    if to is not None:
        path = _with_progress(
            lambda tell: sweep(models, gpu, *sizes, **settings, to=to, on_progress=tell)
        )
        show({"written": str(path)} if as_json else f"{path} written")
        return
    table: Any = sweep(models, gpu, *sizes, **settings)
    if csv is not None:
        write_csv(table, csv)
    if as_json:
        show({"rows": records(table)})
        return
    sized = [name for name in table.columns if name.endswith("_bytes")]
    view = table.drop(columns=["overhead_bytes", "peak_live_bytes", "gpu_memory_bytes"])
    for name in set(sized) & set(view.columns):
        view[name] = [
            "" if value is None else gib(value)
            for value in view[name].astype(object).where(view[name].notna(), None)
        ]
    same = {n: view[n].iloc[0] for n in view.columns if view[n].nunique(dropna=False) == 1}
    told = ", ".join(f"{n} {v}" for n, v in same.items() if str(v) not in ("", "<NA>", "None"))
    varying = view.drop(columns=list(same)).head(MAX_SHOWN)
    show_table(varying, title=f"{len(table):,} estimates: {told}")
    if len(table) > MAX_SHOWN:
        show(f"{len(table) - MAX_SHOWN:,} more: --csv FILE or --to FILE has all of them")


def numbers(field: str, text: str) -> list[int]:
    """1,8,64, and ranges first:last[:step], both ends included."""
    found: list[int] = []
    for part in text.split(","):
        bounds = part.strip().split(":")
        try:
            first, *rest = (int(bound.replace("_", "")) for bound in bounds)
            if len(rest) > 2:
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"{field}={shown(text)} is not understood at {shown(part)}: numbers and "
                "first:last[:step]"
            ) from None
        last, step = (*rest, 1)[:2] if rest else (first, 1)
        if step < 1 or last < first or (last - first) // step >= MAX_VALUES:
            raise ConfigError(
                f"{field}={shown(part)} is not allowed: first ≤ last, step from 1, at most "
                f"{MAX_VALUES:,} numbers"
            )
        found += range(first, last + 1, step)
    return list(dict.fromkeys(found))


def diff_command(
    model: ModelName,
    gpu: GpuName,
    change: Annotated[
        str,
        typer.Option(
            "--change",
            metavar="FIELD=VALUE,…",
            help="What the second deployment has instead: gpu=h200,kv_dtype=fp8,tensor_parallel=2",
        ),
    ],
    batch: Batch = 1,
    prompt: Prompt = 1024,
    output: Output = 1,
    runtime: RuntimeName = "transformers",
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    as_json: AsJson = False,
    csv: CsvFile = None,
) -> None:
    """Two deployments of the same work: which bytes the change adds and takes, by component."""
    work = Inference(batch=batch, prompt_tokens=prompt, output_tokens=output, logits="last")
    before = Deployment(gpu=gpu, runtime=runtime, dtype=dtype, kv_dtype=kv_dtype)
    described = load_model(model)
    first, second = (
        estimate(described, work, deploy) for deploy in (before, changed(before, change))
    )
    table = what_if(first, second)
    if csv is not None:
        write_csv(table, csv)
    if as_json:
        show({"change": change, "rows": table.to_dict("records")})
        return
    for name in ("before_bytes", "after_bytes", "change_bytes"):
        table[name] = [gib(value) for value in table[name]]
    show_table(table, title=f"{described.name}: {change}")
    show(f"before: {first.verdict}\nafter:  {second.verdict}")


def changed(deploy: Deployment, text: str) -> Deployment:
    """A deployment with other fields; ConfigError in one line for what it has not."""
    kinds = {field.name: str(field.type) for field in fields(Deployment)}
    settings: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if name not in kinds or not equals or name == "cache":
            known = ", ".join(sorted(kinds.keys() - {"cache"}))
            raise ConfigError(f"change={shown(part)} is not understood: FIELD=VALUE with {known}")
        try:
            settings[name] = _typed(kinds[name], value)
        except ValueError:
            raise ConfigError(f"{name}={shown(value)} is not allowed: a number") from None
    return replace(deploy, **settings)


def _typed(kind: str, value: str) -> Any:
    if value == "None":
        return None
    if kind.startswith("int"):
        return int(value)
    return float(value) if kind.startswith("float") else value


def _with_progress(run: Callable[[Any], Any]) -> Any:
    """A bar on stderr while `run` tells how far it is."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} cells"),
        BarColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("cells", total=1)
        return run(lambda done, total: progress.update(task, completed=done, total=total))
