"""`planner compare --published`: memory and times that others measured, beside what is planned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.output import print_columns, show
from planner.format import gib, of_value
from planner.report import write_csv

if TYPE_CHECKING:
    from profiles.published import PublishedRow, PublishedSummary  # noqa: TID251
    from profiles.published_latency import LatencyRow, LatencySummary  # noqa: TID251


def show_published(*, as_json: bool, csv: Path | None) -> None:
    """Every published row and the errors by source, as tables or JSON; CSV where asked for."""
    from profiles.published import published_rows, published_summary  # noqa: TID251
    from profiles.published_latency import latency_rows, latency_summary  # noqa: TID251

    rows, times = published_rows(), latency_rows()
    if csv is not None:
        import pandas as pd

        every: list[PublishedRow | LatencyRow] = [*rows, *times]
        write_csv(pd.DataFrame([asdict(row) for row in every]), csv)
    held, took = published_summary(rows), latency_summary(times)
    if as_json:
        parts: dict[str, Sequence[Any]] = {
            "rows": rows,
            "summary": held,
            "latency_rows": times,
            "latency_summary": took,
        }
        show({name: [asdict(row) for row in part] for name, part in parts.items()})
        return
    _print_memory(rows, held)
    _print_latency(times, took)


def _print_memory(rows: Sequence[PublishedRow], summaries: Sequence[PublishedSummary]) -> None:
    print_columns(
        "Published beside predicted (with: what the run's version is known to hold besides)",
        ["run", "quantity"],
        ["predicted", "measured", "error", "with"],
        [
            (
                f"{row.source}: {row.model}, {row.run}",
                row.quantity,
                "not planned" if row.predicted is None else gib(row.predicted),
                gib(row.measured),
                signed(row.relative_error),
                signed(row.named_error),
            )
            for row in rows
        ],
    )
    _print_reasons(rows)
    print_columns(
        "Errors: predicted / measured − 1",
        ["source", "quantity"],
        ["n", "mean |error|", "worst", "mean with", "worst with", "not planned"],
        [
            (
                s.source,
                s.quantity,
                f"{s.n}",
                *map(_share, (s.mean_error, s.worst_error, s.mean_named, s.worst_named)),
                f"{s.unpredicted}" if s.unpredicted else "",
            )
            for s in summaries
        ],
    )


def _print_latency(rows: Sequence[LatencyRow], summaries: Sequence[LatencySummary]) -> None:
    print_columns(
        "Published times beside predicted",
        ["run", "quantity", "planned as"],
        ["predicted", "measured", "error"],
        [
            (
                f"{row.engine}: {row.model} on {row.gpu}, {row.run}",
                row.quantity,
                row.planned_as,
                "not planned" if row.predicted is None else of_value(row.quantity, row.predicted),
                of_value(row.quantity, row.measured),
                signed(row.relative_error),
            )
            for row in rows
        ],
    )
    _print_reasons(rows)
    print_columns(
        "Errors of times: predicted / measured − 1",
        ["engine", "quantity"],
        ["n", "mean", "mean |error|", "worst", "not planned"],
        [
            (
                s.engine,
                s.quantity,
                f"{s.n}",
                signed(s.mean_error),
                *map(_share, (s.mean_abs_error, s.worst_abs_error)),
                f"{s.unpredicted}" if s.unpredicted else "",
            )
            for s in summaries
        ],
    )


def _print_reasons(rows: Sequence[PublishedRow | LatencyRow]) -> None:
    for sentence, count in reasons(rows).items():
        show(f"{count:3} × {sentence}")


def _share(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.2%}"


def reasons(rows: Sequence[PublishedRow | LatencyRow]) -> dict[str, int]:
    """Why rows miss, or are not planned, and how many."""
    counts: dict[str, int] = {}
    for row in rows:
        if row.why:
            counts[row.why] = counts.get(row.why, 0) + 1
    return counts


def signed(error: float | None) -> str:
    """A signed error; empty where there is none."""
    return "" if error is None else f"{error:+.2%}"
