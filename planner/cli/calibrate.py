"""`planner calibrate`: measured ops → the file that times a device. Reaches for profiles."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.catalog.gpus import gpu_named
from planner.cli.options import AsJson
from planner.cli.output import console, show, warn
from planner.cli.profile import duration_s
from planner.errors import ConfigError, check_choice
from planner.timing.calibration_files import own_file

if TYPE_CHECKING:
    from planner.timing.op_times import Fit

BUSY_SHARE = 0.5
"""Programs that want to run, a CPU, in the last minute's mean: beyond it times are others'."""
SOURCES = ("records", "aiconfigurator", "both")


def calibrate_command(
    gpu: Annotated[str, typer.Option("--gpu", help="Short name, or cpu: this machine's own.")],
    origin: Annotated[
        str, typer.Option("--from", help="records (our own), aiconfigurator (tables), or both.")
    ] = "records",
    records: Annotated[
        list[Path] | None,
        typer.Option("--records", metavar="FILE", help="Op records; else those committed."),
    ] = None,
    tables: Annotated[
        Path | None,
        typer.Option("--tables", metavar="FOLDER", help="An unpacked wheel; else as installed."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option("--budget", help="Measure on this machine first, for 8m at the most."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Else measurements/calibration/<gpu>.json."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fit the times of ops, and say how far they are off on shapes that the fit never saw.

    What is written under measurements/calibration (or $PLANNER_CALIBRATION) times the device
    from then on, wherever planner runs beside it.
    """
    from profiles.calibrate import calibration, write  # noqa: TID251
    from profiles.op_tables import package_folder, samples_of_tables  # noqa: TID251

    check_choice("--from", origin, SOURCES)
    gpu_named(gpu)  # before minutes of measuring
    own = origin in ("records", "both")
    if not own and (records or budget):
        raise ConfigError("--records and --budget are not allowed with --from aiconfigurator")
    files = list(records or [])
    if budget is not None:
        files = [_measured(gpu, duration_s(budget), files)]
    loaded, end_to_end = _loaded(gpu, files) if own else (None, [])
    made = None if origin == "records" else samples_of_tables(gpu, package_folder(tables))
    rows: list[dict[str, Any]] = []

    def tell(name: str, count: int, fit: Fit) -> None:
        off = fit.held_out
        rows.append(
            {
                "fit": name,
                "rows": count,
                "points": len(fit.weights),
                "held_out": 0 if off is None else off.count,
                "median_error": None if off is None else off.median,
                "p90_error": None if off is None else off.p90,
            }
        )

    content = calibration(gpu, records=loaded, tables=made, end_to_end=end_to_end, tell=tell)
    path = out or own_file(gpu)
    size = write(content, path)
    if as_json:
        show({"gpu": gpu, "written": str(path), "bytes": size, "fits": rows})
        return
    _show(rows, f"{gpu}: {path}, {size:,} bytes")


def _measured(gpu: str, budget_s: float, files: list[Path]) -> Path:
    """Time what the file lacks, here and now."""
    from profiles.microbench.run import run  # noqa: TID251

    if len(files) > 1:
        raise ConfigError("--budget appends to one file: --records FILE once")
    path = files[0] if files else Path("measurements/microbench") / f"{gpu}.jsonl"
    busy = _busy() if gpu == "cpu" else None
    if busy:
        warn(busy)
    run("cpu" if gpu == "cpu" else "cuda", budget_s=budget_s, out=path)
    return path


def _busy() -> str | None:
    """In a line: that others work beside what is to be timed; None where they do not."""
    cpus = os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load < BUSY_SHARE * cpus:
        return None
    return f"{load:.1f} programs run on {cpus} CPUs: the times will be of a busy machine"


def _loaded(gpu: str, files: list[Path]) -> tuple[Any, list[Any]]:
    """Op records, and the end-to-end records beside them, of which two rows are looked at."""
    import profiles.records as whole  # noqa: TID251
    from profiles.microbench.op_record import OpRecords, load  # noqa: TID251

    folder = Path(whole.__file__).parent / "data"
    found = [load(path) for path in files or [folder / "microbench" / f"{gpu}.jsonl"]]
    merged = OpRecords(
        ops=tuple(op for part in found for op in part.ops),
        states=(),
        environments={name: e for part in found for name, e in part.environments.items()},
        problems=(),
    )
    committed = folder / f"{gpu}.jsonl"
    return merged, whole.load([committed])[0] if committed.exists() and not files else []


def _show(rows: list[dict[str, Any]], title: str) -> None:
    from rich.table import Table

    table = Table(title=title)
    for name in ("fit", "rows", "points", "held out", "median", "p90"):
        table.add_column(name, justify="left" if name == "fit" else "right")
    for row in rows:
        errors = [row["median_error"], row["p90_error"]]
        told = ["" if e is None else f"{e:.1%}" for e in errors]
        counts = [f"{row[name]:,}" for name in ("rows", "points", "held_out")]
        table.add_row(row["fit"], *counts, *told)
    console().print(table)
