"""`planner explain-log`: an engine's start-up log or torch's out-of-memory message, explained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from planner.engine_logs import explain_log
from planner.errors import ConfigError

MAX_BYTES = 64 * 2**20


def explain_log_command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A log, or - for standard input.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="The model, where the log's own name is not known."),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Short name, where the log does not say.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write the comparison.")
    ] = None,
) -> None:
    """What vLLM or torch printed beside the plan, why they differ, and what would make it fit.

    Nothing that the log names is opened or downloaded.
    """
    explained = explain_log(read_text(file), model, gpu=gpu)
    if csv is not None:
        explained.to_csv(csv)
    print(json.dumps(explained.to_dict(), indent=1) if as_json else explained.explain())


def read_text(file: str) -> str:
    """A file or standard input as text; ConfigError in one line for what cannot be read."""
    try:
        if file == "-":
            content = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            path = Path(file)
            if not path.is_file():
                raise ConfigError(f"{file!r} is not a log: no such file")
            with path.open("rb") as opened:
                content = opened.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{file!r} cannot be read: {reason}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{file!r} has more than {MAX_BYTES >> 20} MiB: cut out the start-up")
    return content.decode("utf-8", errors="replace")
