"""The catalogue of sharp edges (catalog/edges.toml), and findings made from it."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from planner.findings import Finding, Severity


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """A mistake that is made again and again: its pattern, what follows, what helps.

    `found_in`: config, module, source. `next`: where the work belongs next.
    """

    id: str
    title: str
    pattern: str
    why: str
    symptoms: str
    remedy: str
    severity: Severity
    found_in: tuple[str, ...]
    next: tuple[str, ...]


@cache
def edges() -> dict[str, Edge]:
    """All sharp edges by id, in the file's order."""
    text = files("planner.catalog").joinpath("edges.toml").read_text(encoding="utf-8")
    return {
        name: Edge(id=name, found_in=tuple(e.pop("found_in")), next=tuple(e.pop("next")), **e)
        for name, e in tomllib.loads(text).items()
    }


def found(
    edge: str,
    seen: str,
    *,
    where: str = "",
    severity: Severity | None = None,
    title: str = "",
    do: str = "",
    file: str = "",
    line: int | None = None,
) -> Finding:
    """A finding of this edge; the catalogue's words where none are given."""
    known = edges()[edge]
    return Finding(
        id=edge,
        severity=severity or known.severity,
        title=title or known.title,
        seen=seen,
        why=known.why,
        symptoms=known.symptoms,
        do=do or known.remedy,
        where=where,
        file=file,
        line=line,
        next=known.next,
    )
