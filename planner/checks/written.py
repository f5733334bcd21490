"""Findings for others to read: JSON, SARIF, Markdown, a table."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from planner.checks.edges import edges
from planner.findings import SHARP, Finding

if TYPE_CHECKING:
    import pandas as pd

LEVELS = {"critical": "error", "high": "error", "medium": "warning", "info": "note"}
RANKS = {"critical": "9.5", "high": "8.0", "medium": "5.0", "info": "1.0"}
SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"


def in_words(findings: Sequence[Finding], target: str) -> str:
    """How many of which severity, in one line."""
    if not findings:
        return f"{target}: nothing found"
    counts = Counter(finding.severity for finding in findings)
    parts = ", ".join(f"{counts[s]} {s}" for s in SHARP if counts[s])
    return f"{target}: {len(findings)} finding{'s' * (len(findings) > 1)}: {parts}"


def to_dict(findings: Sequence[Finding], target: str) -> dict[str, Any]:
    """As plain JSON types."""
    return {
        "target": target,
        "findings": [{**asdict(f), "next": list(f.next)} for f in findings],
    }


def table(findings: Sequence[Finding]) -> pd.DataFrame:
    """A row for each finding, the catalogue's words included."""
    import pandas as pd

    columns = [
        "severity", "id", "title", "where", "seen", "why", "symptoms", "do", "file", "line", "next",
    ]  # fmt: skip
    rows = [[_cell(getattr(f, name)) for name in columns] for f in findings]
    return pd.DataFrame(rows, columns=columns)


def _cell(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    return "" if value is None else str(value)


def markdown(findings: Sequence[Finding], target: str) -> str:
    """A table of all and a section for each."""
    lines = [f"# {plain(in_words(findings, target))}", ""]
    if findings:
        lines += ["| severity | finding | where | seen |", "|---|---|---|---|"]
        lines += [
            f"| {f.severity} | {plain(f.title)} | {plain(f.where)} | {plain(f.seen)} |"
            for f in findings
        ]
    for f in findings:
        lines += ["", f"## {plain(f.title)}", ""]
        words = {"Seen": f.seen, "Why": f.why, "Symptoms": f.symptoms, "Do": f.do, "Where": f.where}
        lines += [f"- **{name}**: {plain(text)}" for name, text in words.items() if text]
        if f.next:
            lines.append(f"- **Next**: {', '.join(f.next)}")
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Text that is no markup: in a table, of HTML or of Markdown."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    for sign in "\\`*_[]|$":
        escaped = escaped.replace(sign, f"\\{sign}")
    return escaped


def sarif(findings: Sequence[Finding], target: str) -> str:
    """SARIF 2.1.0, which editors and CI systems show beside the code."""
    used = [edge for edge in edges().values() if any(f.id == edge.id for f in findings)]
    rules = [
        {
            "id": edge.id,
            "name": "".join(word.title() for word in edge.id.split("-")),
            "shortDescription": {"text": edge.title},
            "fullDescription": {"text": edge.pattern},
            "help": {"text": f"{edge.why} {edge.remedy}"},
            "defaultConfiguration": {"level": LEVELS[edge.severity]},
            "properties": {"tags": list(edge.next), "security-severity": RANKS[edge.severity]},
        }
        for edge in used
    ]
    index = {edge.id: i for i, edge in enumerate(used)}
    run = {
        "tool": {
            "driver": {
                "name": "transformer-planner",
                "rules": rules,
            }
        },
        "columnKind": "unicodeCodePoints",
        "results": [_result(f, index, target) for f in findings],
    }
    return json.dumps({"$schema": SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}, indent=1) + "\n"


def _result(f: Finding, index: dict[str, int], target: str) -> dict[str, Any]:
    result: dict[str, Any] = {
        "ruleId": f.id,
        "level": LEVELS.get(f.severity, "warning"),
        "message": {"text": f"{f.title}: {f.seen}. {f.do}".strip()},
        "properties": {"severity": f.severity, "where": f.where},
    }
    if f.id in index:
        result["ruleIndex"] = index[f.id]
    location: dict[str, Any] = {}
    if f.file:
        location["physicalLocation"] = {
            "artifactLocation": {"uri": _uri(f.file)},
            "region": {"startLine": f.line or 1},
        }
    if f.where and not f.where.startswith(f.file or "\0"):
        location["logicalLocations"] = [{"fullyQualifiedName": f"{target}: {f.where}"}]
    if location:
        result["locations"] = [location]
    return result


def _uri(file: str) -> str:
    """A path as it stands in a repository: relative where it lies below the current folder."""
    path = Path(file)
    if not path.is_absolute():
        return quote(path.as_posix())
    here = Path.cwd()
    if path.is_relative_to(here):
        return quote(path.relative_to(here).as_posix())
    return path.as_uri()
