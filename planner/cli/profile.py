"""`planner profile`: measure, and hold it against the prediction. Reaches for profiles."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.compare import print_rows
from planner.cli.options import AsJson, Attention, Batch, Cache, Dtype, KvDtype, Output, Prompt
from planner.cli.output import exit_unless, show, warn
from planner.errors import ConfigError, check_choice, shown
from planner.loading import load_model
from planner.workload import cache_spec

if TYPE_CHECKING:
    from profiles.suite_run import Progress, Run  # noqa: TID251

APART = ("microbench", "overheads")
"""Suites whose records are not those of models: times of ops, and what a process holds."""

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


def duration_s(text: str) -> float:
    """Seconds of "540s", "9m", "1.5h" or a plain number; ConfigError else."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS_S else (text, "s")
    try:
        value = float(number) * UNITS_S[unit]
    except ValueError:
        value = -1.0
    if not 0 < value < 1e7:
        raise ConfigError(f"budget={shown(text)} is not allowed: a time such as 540s, 9m or 1.5h")
    return value


def profile_command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="As elsewhere; none with --suite.")
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite",
            help="smoke, cpu, inference, training, methods, latency, host, caches, allocator, "
            "microbench or overheads.",
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Of a suite: begin nothing after 540s, 9m.")
    ] = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Of a suite: only what the file does not have yet.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option("--ray", metavar="ADDRESS", help="Of a suite: over a Ray cluster; local."),
    ] = None,
    batch: Batch = 1,
    prompt: Prompt = 512,
    output: Output = 32,
    device: Annotated[str, typer.Option("--device", help="auto, cuda or cpu.")] = "auto",
    runtime: Annotated[str, typer.Option("--runtime", help="attnlab or transformers.")] = "attnlab",
    dtype: Dtype = None,
    kv_dtype: KvDtype = None,
    cache: Cache = None,
    attention: Attention = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Timed runs of each pass.")] = 5,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Records, appended.")] = Path(
        "measurements/records.jsonl"
    ),
    memory_viz: Annotated[
        Path | None,
        typer.Option(
            "--memory-viz",
            metavar="FILE",
            help="Of a model on CUDA: its allocations, for pytorch.org/memory_viz. Times suffer.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a model, or a suite of them, for real; append what was seen to a record file.

    A model: prefill, decode and generation, here and now. A suite: each point in a process of its
    own, the most valuable first. Exit 1 where something ended in an error.
    """
    if suite is not None:
        if model is not None:
            raise ConfigError(f"MODEL={shown(model)} is not allowed with --suite: it has its own")
        own = {"--memory-viz": memory_viz, "--kv-dtype": kv_dtype, "--cache": cache}
        _refuse_options("--suite", own)
        how = {"device": device, "budget": budget, "missing": missing, "ray": ray}
        _suite(suite, **how, out=out, as_json=as_json)  # type: ignore[arg-type]
        return
    if model is None:
        raise ConfigError("MODEL is missing: a model as elsewhere, or --suite NAME")
    _refuse_options("no --suite", {"--budget": budget, "--missing": missing, "--ray": ray})
    options: dict[str, Any] = {
        "batch": batch,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "device": device,
        "runtime": runtime,
        "dtype": dtype,
        "kv_dtype": kv_dtype,
        "cache": None if cache is None else cache_spec(cache),
        "attention": attention,
        "repeats": repeats,
        "out": out,
    }
    from profiles.compare import compare  # noqa: TID251
    from profiles.history import drawn_by_memory_viz  # noqa: TID251
    from profiles.runner import profile  # noqa: TID251

    described = load_model(model)
    drawn = drawn_by_memory_viz(memory_viz, device=device) if memory_viz else nullcontext()
    with drawn:
        if as_json:
            records = profile(described, **options)
        else:
            records = _with_progress(
                lambda report: profile(described, on_progress=report, **options)
            )
    rows = compare(records, on_problem=warn)
    if as_json:
        show({"records": [r.id for r in records], "rows": [asdict(row) for row in rows]})
    else:
        print_rows(rows)
        show(f"{len(records)} records appended to {out}")
    exit_unless(all(record.status == "ok" for record in records))


def _suite(
    name: str,
    *,
    device: str,
    budget: str | None,
    missing: bool,
    ray: str | None,
    out: Path,
    as_json: bool,
) -> None:
    from profiles.compare import compare  # noqa: TID251
    from profiles.suite_run import run_suite  # noqa: TID251
    from profiles.suites import SUITES  # noqa: TID251

    seconds_left = None if budget is None else duration_s(budget)
    check_choice("suite", name, (*SUITES, *APART))
    if name in APART:
        _refuse_options(f"--suite {name}", {"--ray": ray, "--json": as_json})
    if ray is not None:
        _refuse_options("--ray", {"--budget": budget, "--missing": missing})
    if name in APART:
        raise typer.Exit(_apart(name, device, seconds_left, missing=missing, out=out))
    run: Run
    if ray is not None:
        from profiles.ray_run import run_on_ray  # noqa: TID251

        address = None if ray == "local" else ray
        on = "cuda" if device == "auto" else device
        run = run_on_ray(name, address=address, device=on, out=out, on_progress=_tell)
    else:
        run = run_suite(
            name,
            device=device,
            out=out,
            budget_s=seconds_left,
            only_missing=missing,
            on_progress=_tell,
        )
    rows = compare(run.records, on_problem=lambda problem: None)
    if as_json:
        show(
            {
                "records": [record.id for record in run.records],
                "skipped": list(run.skipped),
                "rows": [asdict(row) for row in rows],
            }
        )
    else:
        if rows:
            print_rows(rows)
        for reason in run.skipped:
            show(f"not measured: {reason}")
        bad = [record for record in run.records if record.status != "ok"]
        for record in bad:
            show(f"{record.point}: {record.status}")
        show(f"{len(run.records)} records appended to {out}, {len(bad)} of them not ok")
    exit_unless(all(not record.status.startswith("error") for record in run.records))


def _refuse_options(beside: str, options: Mapping[str, object]) -> None:
    """ConfigError for an option that was given and means nothing there."""
    for name, value in options.items():
        if value:
            raise ConfigError(f"{name} is not allowed with {beside}")


def _apart(name: str, device: str, budget_s: float | None, *, missing: bool, out: Path) -> int:
    """A suite with a program of its own, in a process that has not touched the device."""
    command = [sys.executable, "-m", f"profiles.{name}", "--out", str(out)]
    if name == "microbench":
        command += ["--device", device]
        command += ["--missing"] * missing
        command += [] if budget_s is None else ["--budget", f"{budget_s:g}"]
    return subprocess.call(command)


def _tell(progress: Progress) -> None:
    """A line for each point that ended: piped into a file it is a log."""
    from rich.console import Console

    record = progress.record
    if record is None:
        return
    eta = "" if progress.eta_s is None else f", {progress.eta_s:4.0f} s to go"
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{progress.done:3d} of {progress.total} after {progress.elapsed_s:4.0f} s{eta}  "
        f"{record.status[:60]:6} {progress.what}",
        markup=False,
    )


def _with_progress(run: Callable[[Any], Any]) -> Any:
    """Run with a bar: `report(done, total, label)` moves it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, transient=True, console=console, disable=hidden) as progress:
        task = progress.add_task("building", total=None)

        def report(done: int, total: int, label: str) -> None:
            progress.update(task, completed=done, total=total, description=label)

        return run(report)
