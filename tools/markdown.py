"""Tables in Markdown, and their places in a page between marks."""

from __future__ import annotations

from collections.abc import Sequence


def table(lines: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first two the head and its alignment."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def between(begin: str, end: str, text: str, part: str) -> str:
    """`text` with `part` between its marks; SystemExit where it has none."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"no {begin} … {end} in the page")
    return f"{before}{begin}\n{part}\n{end}{after}"
