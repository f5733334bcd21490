"""How commands answer: text or JSON on stdout, tables, exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console


def exit_unless(answer: bool) -> None:
    """Exit code 1 where the answer is no."""
    if not answer:
        raise typer.Exit(1)


def show(content: Any) -> None:
    """Text as it is, anything else as JSON."""
    print(content if isinstance(content, str) else json.dumps(content, indent=1))


def console() -> Console:
    """Where tables go."""
    from rich.console import Console

    # piped, a table is as wide as its content, so that nothing is cut
    return Console(width=None if sys.stdout.isatty() else 200)


def show_table(table: pd.DataFrame, *, title: str) -> None:
    """A table for people."""
    from rich.table import Table

    view = Table(title=title, title_justify="left")
    for column in table.columns:
        view.add_column(str(column), overflow="fold")
    for row in table.itertuples(index=False):
        view.add_row(*("" if str(cell) == "<NA>" else str(cell) for cell in row))
    console().print(view)


def print_columns(
    title: str, left: Sequence[str], right: Sequence[str], lines: Iterable[Sequence[str]]
) -> None:
    """A table of words: `left` and then `right` head its columns, aligned as they are called."""
    from rich.table import Table

    view = Table(title=title, title_justify="left")
    for column in left:
        view.add_column(column)
    for column in right:
        view.add_column(column, justify="right")
    for line in lines:
        view.add_row(*line)
    console().print(view)


def warn(message: str) -> None:
    """One line on stderr."""
    print(f"planner: {message}", file=sys.stderr)


def refuse(message: str) -> int:
    """Bad input: one line on stderr and the exit code that stands for it."""
    warn(" ".join(message.split()))
    return 2
