"""`planner schema`: the JSON schema of what another command prints with --json."""

from __future__ import annotations

from importlib.resources import files
from typing import Annotated

import typer

from planner.errors import check_choice


def schema_names() -> list[str]:
    """The commands whose answers have a schema."""
    folder = files("planner.catalog") / "schemas"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir())


def schema_text(command: str) -> str:
    """The schema as JSON; ConfigError for a command without one."""
    check_choice("command", command, schema_names())
    found = files("planner.catalog") / "schemas" / f"{command}.json"
    return found.read_text(encoding="utf-8")


def schema_command(
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="estimate, fit, sweep, …")],
) -> None:
    """The JSON schema of `planner COMMAND --json`."""
    print(schema_text(command), end="")
