"""`planner compare --published`: memory that others measured, beside what is planned for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli.output import print_columns, show
from planner.format import gib
from planner.report import write_csv

if TYPE_CHECKING:
    from profiles.published import PublishedRow  # noqa: TID251


def show_published(*, as_json: bool, csv: Path | None) -> None:
    """Every published row and the errors by source, as a table or JSON; CSV where asked for."""
    from profiles.published import published_rows, published_summary  # noqa: TID251

    rows = published_rows()
    if csv is not None:
        import pandas as pd

        write_csv(pd.DataFrame([asdict(row) for row in rows]), csv)
    summaries = published_summary(rows)
    if as_json:
        show({"rows": [asdict(r) for r in rows], "summary": [asdict(s) for s in summaries]})
        return
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
    for sentence, count in reasons(rows).items():
        show(f"{count:3} × {sentence}")
    print_columns(
        "Errors: predicted / measured − 1",
        ["source", "quantity"],
        ["n", "mean |error|", "worst", "mean with", "worst with", "not planned"],
        [
            (
                s.source,
                s.quantity,
                f"{s.n}",
                *(
                    "" if value is None else f"{value:.2%}"
                    for value in (s.mean_error, s.worst_error, s.mean_named, s.worst_named)
                ),
                f"{s.unpredicted}" if s.unpredicted else "",
            )
            for s in summaries
        ],
    )


def reasons(rows: Sequence[PublishedRow]) -> dict[str, int]:
    """Why rows miss, or are not planned, and how many."""
    counts: dict[str, int] = {}
    for row in rows:
        if row.why:
            counts[row.why] = counts.get(row.why, 0) + 1
    return counts


def signed(error: float | None) -> str:
    """A signed error; empty where there is none."""
    return "" if error is None else f"{error:+.2%}"
