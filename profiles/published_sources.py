"""Where a published row is from: `owner/repository@commit:path#place`, as its files are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from planner.errors import ConfigError

FOLDER = Path(__file__).parent / "data" / "published"


def read(name: str) -> list[dict[str, Any]]:
    """The rows as they were collected, with source and licence.

    ConfigError where the package was installed without them.
    """
    path = FOLDER / name
    if not path.is_file():
        raise ConfigError(f"{path} is missing: this installation has no published rows")
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def repository(record: dict[str, Any]) -> str:
    """The repository's short name."""
    return str(record["source"]).partition("@")[0].rpartition("/")[2]


def address(record: dict[str, Any]) -> str:
    """The page that the row was read from, at its commit."""
    name, _, rest = str(record["source"]).partition("@")
    commit, _, path = rest.partition("#")[0].partition(":")
    return f"https://github.com/{name}/blob/{commit}/{path}"
