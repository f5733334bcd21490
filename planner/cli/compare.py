"""`planner compare`: predicted beside measured, after how repeatable the measurements are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.options import AsJson, CsvFile
from planner.cli.output import print_columns, show, warn
from planner.cli.published import show_published
from planner.errors import ConfigError
from planner.format import gib, percent, seconds
from planner.report import write_csv

if TYPE_CHECKING:
    from profiles.baselines import BaselineSummary  # noqa: TID251
    from profiles.peers import PeerRow  # noqa: TID251
    from profiles.repeatability import Repeatability  # noqa: TID251
    from profiles.rows import Row  # noqa: TID251
    from profiles.summaries import Summary  # noqa: TID251


def compare_command(
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Record files; else all found.")
    ] = None,
    by: Annotated[
        str | None,
        typer.Option("--by", help="Errors by suite, model, phase or device, not row by row."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Beside ours, what simpler rules and peers say.")
    ] = False,
    traced: Annotated[
        bool, typer.Option("--traced", help="Beside both, the same modules on fake tensors.")
    ] = False,
    published: Annotated[
        bool, typer.Option("--published", help="What others measured, in place of records.")
    ] = False,
    as_json: AsJson = False,
    csv: CsvFile = None,
) -> None:
    """Predicted beside measured, with signed errors, for every stored record.

    First how far repeated measurements are apart; then rows, and errors in a few numbers, those of
    the points that constants may be fitted on (calibration) apart from the rest (held-out).
    """
    from profiles.baselines import baseline_summary  # noqa: TID251
    from profiles.baselines import baselines as of_baselines  # noqa: TID251
    from profiles.compare import compare, summary, to_frame  # noqa: TID251
    from profiles.peers import peer_rows  # noqa: TID251
    from profiles.record_cpu import untimed  # noqa: TID251
    from profiles.records import default_paths, load  # noqa: TID251
    from profiles.repeatability import repeatability, repeats  # noqa: TID251
    from profiles.summaries import GROUPS  # noqa: TID251

    if published:
        if files or by is not None or baselines or traced:
            raise ConfigError("--published stands alone: neither files nor other views")
        show_published(as_json=as_json, csv=csv)
        return
    if by is not None and by not in GROUPS:
        raise ConfigError(f"--by {by} is not allowed: one of {', '.join(GROUPS)}")
    for file in files or ():
        if not file.is_file():
            raise ConfigError(f"{file} is not a record file: no such file")
    records, problems = load(files or default_paths())
    for problem in problems:
        warn(problem)
    rows = compare(records, traced=traced, on_problem=warn)
    if hint := untimed(records):
        warn(hint)
    if csv is not None:
        write_csv(to_frame(rows), csv)
    spreads = repeatability(repeats(records))
    groups = [] if by is None else summary(rows, by=by)
    others = baseline_summary(of_baselines(records, rows)) if baselines else []
    peers = peer_rows(records) if baselines else []
    if as_json:
        parts: dict[str, Sequence[Any]] = {
            "rows": rows,
            "summary": summary(rows),
            "repeatability": spreads,
            "groups": groups,
            "baselines": others,
            "peers": peers,
        }
        show({name: [asdict(row) for row in part] for name, part in parts.items()})
    elif rows:
        _print_repeatability(spreads)
        if by is None:
            print_rows(rows)
        _print_summaries(groups or summary(rows))
        if baselines:
            _print_baselines(others)
            _print_peers(peers)
    elif files and problems:
        raise typer.Exit(2)
    else:
        show("No measurements yet. Make some: planner profile llama-50m --device cpu")


def print_rows(rows: Sequence[Row]) -> None:
    """Every row for people."""
    traced = ["traced"] * any(row.traced is not None for row in rows)
    columns = ["device", "model", "phase", "quantity"]
    print_columns(
        "Predicted beside measured",
        columns,
        ["predicted", *traced, "measured", "error"],
        [
            (
                row.device,
                row.model,
                row.phase,
                row.quantity,
                "not predicted" if row.predicted is None else _value(row, row.predicted),
                *("" if row.traced is None else _value(row, row.traced) for _ in traced),
                _value(row, row.measured),
                _error(row.relative_error),
            )
            for row in rows
        ],
    )


def _print_repeatability(spreads: Sequence[Repeatability]) -> None:
    devices = dict.fromkeys(spread.device for spread in spreads)
    again = {spread.device for spread in spreads if spread.between == "runs"}
    if spreads:
        print_columns(
            "Repeatability: (largest − smallest) / median of one point measured again",
            ["device", "between", "quantity"],
            ["points", "mean spread", "worst"],
            [
                (s.device, s.between, s.quantity, f"{s.points}", _share(s.mean_spread),
                 _share(s.worst_spread))
                for s in spreads
            ],
        )  # fmt: skip
    for device in devices:
        if device not in again:
            show(f"{device}: no point was measured by two runs yet\n")


def _print_summaries(groups: Sequence[Summary]) -> None:
    by = next((group.by for group in groups if group.by), None)
    print_columns(
        "Errors: predicted / measured − 1",
        [*([by] if by else []), "quantity", "split"],
        ["n", "mean", "mean |error|", "p90", "worst", "not predicted"],
        [
            (
                *([g.group or "none"] if by else []),
                g.quantity,
                g.split or "none",
                f"{g.n}",
                _error(g.mean_error),
                *map(_share, (g.mean_abs_error, g.p90_abs_error, g.worst_abs_error)),
                f"{g.unpredicted}" if g.unpredicted else "",
            )
            for g in groups
        ],
    )


def _print_baselines(others: Sequence[BaselineSummary]) -> None:
    print_columns(
        "Baselines: |error| of each method, and ours on the same rows",
        ["device", "quantity", "split", "method"],
        ["n", "mean", "p90", "worst", "our mean", "our p90", "our worst"],
        [
            (
                o.device,
                o.quantity,
                o.split or "none",
                o.method,
                f"{o.n}",
                *map(
                    _share,
                    (
                        o.mean_abs_error,
                        o.p90_abs_error,
                        o.worst_abs_error,
                        o.planner_mean_abs_error,
                        o.planner_p90_abs_error,
                        o.planner_worst_abs_error,
                    ),
                ),
            )
            for o in others
        ],
    )


def _print_peers(rows: Sequence[PeerRow]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row.peers_s))
    print_columns(
        "Llama-3.1-8B in bf16 on an H200: serving engines as other tools see them, vLLM as we do",
        ["quantity", "batch × prompt"],
        ["ours", *names, "measured"],
        [
            (
                row.quantity,
                f"{row.batch} × {row.prompt_tokens:,}",
                seconds(row.planner_s),
                *(seconds(row.peers_s[name]) if name in row.peers_s else "" for name in names),
                "; ".join(f"{seconds(s)} ({where})" for where, s in row.measured_s.items()),
            )
            for row in rows
        ],
    )


def _value(row: Row, value: float) -> str:
    return gib(value) if row.quantity.endswith("_bytes") else seconds(value)


def _share(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.2%}"


def _error(relative_error: float | None) -> str:
    if relative_error is None:
        return ""
    return "exact" if relative_error == 0 else percent(relative_error)
