"""A finding: something that is not as described, with what was seen and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Severity = Literal["critical", "high", "medium", "info", "error", "warning", "note"]
SHARP: tuple[Severity, ...] = ("critical", "high", "medium", "info")
"""How bad a sharp edge of a model is, worst first. Findings on files say error, warning, note."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was found.

    Severity of a sharp edge: "critical" (wrong results or a crash), "high" (it costs a training run
    or an outage), "medium" (it costs quality, time or memory), "info". On files "error": the answer
    is no; "note": good to know.

    `seen` holds the values, `why` what follows from them, `symptoms` how it shows, `do` what helps,
    `where` the place: a field, a module's name, `path:line`. `file` and `line` are those of a
    source or config file. `next`: where the work belongs next.
    """

    id: str
    severity: Severity
    title: str
    seen: str
    why: str
    symptoms: str = ""
    do: str = ""
    where: str = ""
    file: str = ""
    line: int | None = None
    next: tuple[str, ...] = ()

    @property
    def fails(self) -> bool:
        """Whether a check that found this is failed."""
        return self.severity in ("critical", "high", "error")


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """By severity, then by place; what was found twice in one place once."""
    kept = {(f.id, f.severity, f.where, f.seen): f for f in findings}
    return sorted(
        kept.values(),
        key=lambda f: (
            SHARP.index(f.severity) if f.severity in SHARP else len(SHARP),
            f.file,
            f.line or 0,
            f.where,
            f.id,
        ),
    )


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
