"""A finding: something that is not as described, with what was seen and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was found. Severity "error": the answer is no; "note": good to know.

    `seen` holds the values, `why` what follows from them, `do` what helps, `where` the place.
    """

    id: str
    severity: Literal["error", "warning", "note"]
    title: str
    seen: str
    why: str
    do: str = ""
    where: str = ""


def listed(names: list[str], *, most: int = 3) -> str:
    """The first names and how many more there are, in one line."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def missing_shards(absent: list[str], *, of: int, tensors: int | None, where: str) -> Finding:
    """Files of a split checkpoint that are not there."""
    lost = "" if tensors is None else f": {tensors:,} tensors"
    return Finding(
        id="missing-shard",
        severity="error",
        title=f"{len(absent):,} of {of:,} shards are missing",
        seen=listed(absent) + lost,
        why="The bytes are those of the files that are there; the model cannot be loaded.",
        do="Download the missing files.",
        where=where,
    )
