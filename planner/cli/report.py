"""`planner report`: what a fleet's services take, as Markdown, CSV, Parquet or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from planner.capacity.fleet import load_fleet
from planner.capacity.fleet_report import best_rows, capacity_report, report_markdown
from planner.cli.options import AsJson
from planner.cli.output import exit_unless, show
from planner.report import write_csv, write_parquet, write_text


def report_command(
    fleet: Annotated[
        Path,
        typer.Argument(
            metavar="FLEET.toml", help="GPUs owned, services, their traffic and targets."
        ),
    ],
    as_json: AsJson = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="For Excel and pandas.")
    ] = None,
    parquet: Annotated[Path | None, typer.Option("--parquet", metavar="FILE")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", metavar="FILE")] = None,
) -> None:
    """A row for every service, kind of GPU and layout. Exit 1 if a service lacks GPUs."""
    found = load_fleet(fleet)
    table = capacity_report(found)
    best = best_rows(table)
    if csv is not None:
        write_csv(table, csv, excel=True)
    if parquet is not None:
        write_parquet(table, parquet)
    if markdown is not None:
        write_text(report_markdown(table), markdown)
    if as_json:
        show({"rows": records(table), "best": records(best)})
    else:
        show(report_markdown(table))
    exit_unless(len(best) == len(found.services) and bool(best["enough"].all()))


def records(table: Any) -> list[dict[str, Any]]:
    """Rows as plain JSON types."""
    plain = table.astype(object).where(table.notna(), None)
    return [dict(row) for row in plain.to_dict("records")]
