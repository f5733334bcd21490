"""Errors of many rows in a few numbers: how many, bias, mean, 90th percentile, worst."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from planner.errors import check_choice
from profiles.rows import QUANTITIES, Row

GROUPS = ("suite", "model", "phase", "device")
"""What a summary can be made by, beside quantity and split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The errors of one quantity in one split, of all rows or of one group of them.

    `*_abs_error` are of the relative error without its sign, `mean_error` is with it: the bias.
    """

    quantity: str
    split: str | None
    n: int
    unpredicted: int
    mean_abs_error: float | None
    p90_abs_error: float | None
    worst_abs_error: float | None
    mean_error: float | None = None
    worst_record: str | None = None  # None too where every error is nothing
    by: str | None = None  # "model": what `group` is one of
    group: str | None = None  # None too where the rows have no suite


def summary(rows: Iterable[Row], *, by: str | None = None) -> list[Summary]:
    """A summary for each quantity and split, the two splits never together; `by`: and group."""
    if by is not None:
        check_choice("by", by, GROUPS)
    groups: dict[tuple[str | None, str, str | None], list[Row]] = {}
    for row in rows:
        group = None if by is None else getattr(row, by)
        groups.setdefault((group, row.quantity, row.split), []).append(row)
    order = sorted(groups, key=lambda g: (g[0] or "", QUANTITIES.index(g[1]), g[2] or ""))
    return [
        _summarise(quantity, split, groups[group, quantity, split], by=by, group=group)
        for group, quantity, split in order
    ]


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """Of sorted numbers, linear between neighbours, as numpy's default."""
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _summarise(
    quantity: str, split: str | None, rows: list[Row], *, by: str | None, group: str | None
) -> Summary:
    known = [(r.relative_error, r.record) for r in rows if r.relative_error is not None]
    errors = sorted(abs(error) for error, _ in known)
    return Summary(
        quantity=quantity,
        split=split,
        n=len(errors),
        unpredicted=sum(row.predicted is None for row in rows),
        mean_abs_error=statistics.fmean(errors) if errors else None,
        p90_abs_error=percentile(errors, 0.9) if errors else None,
        worst_abs_error=errors[-1] if errors else None,
        mean_error=statistics.fmean(error for error, _ in known) if known else None,
        worst_record=max(known, key=lambda k: abs(k[0]))[1] if errors and errors[-1] else None,
        by=by,
        group=group,
    )
