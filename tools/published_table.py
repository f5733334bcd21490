"""Write docs/published.md, and its summary in docs/accuracy.md, from `profiles/data/published`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from planner.cli.published import reasons, signed
from planner.format import of_quantity
from planner.report import write_text
from profiles.published import PublishedRow, published_rows, published_summary
from tools import markdown

ROOT = Path(__file__).parents[1]
ACCURACY, PAGE = ROOT / "docs" / "accuracy.md", ROOT / "docs" / "published.md"
BEGIN = "<!-- published: written by `python -m tools.published_table` -->"
END = "<!-- /published -->"
HEAD = """# Memory that others measured

Written by `python -m tools.published_table`; `planner compare --published` prints it. The rows are
those of `profiles/data/published/memory.jsonl`, each with its source and licence. Nothing was
fitted on them. GB are 10⁹ bytes; *with* adds what the version that ran is known, by its source, to
hold beside what transformers 5.23 does, and takes off what a compiled one does not hold; numbers
stand for the sentences below, which every miss above 5 % has.
"""


def summary_table(rows: Sequence[PublishedRow]) -> str:
    """Source × quantity: errors, and errors with what the versions name."""
    head = ["source", "quantity", "n", "mean \\|error\\|", "worst", "mean with", "worst with"]
    lines = [[*head, "not planned"], ["---"] * 2 + ["--:"] * 6]
    for s in published_summary(rows):
        figures = (s.mean_error, s.worst_error, s.mean_named, s.worst_named)
        cells = ["" if value is None else f"{value:.2%}".replace("%", " %") for value in figures]
        lines.append(
            [s.source, of_quantity(s.quantity), f"{s.n}", *cells, f"{s.unpredicted or ''}"]
        )
    return markdown.table(lines)


def page(rows: Sequence[PublishedRow]) -> str:
    """The whole table, its sentences, its sources."""
    marks = {why: f"({index})" for index, why in enumerate(reasons(rows), 1)}
    head = ["run", "quantity", "predicted GB", "measured GB", "error", "with", ""]
    lines = [head, ["---"] * 2 + ["--:"] * 4 + ["---"]]
    for row in rows:
        predicted = "" if row.predicted is None else f"{row.predicted / 1e9:.2f}"
        lines.append(
            [
                f"{row.source}: {row.model} on {row.gpu}, {row.run}",
                of_quantity(row.quantity),
                predicted,
                f"{row.measured / 1e9:.2f}",
                signed(row.relative_error).replace("%", " %"),
                signed(row.named_error).replace("%", " %"),
                marks.get(row.why, ""),
            ]
        )
    sentences = "\n".join(f"- {mark} {why}." for why, mark in marks.items())
    return "\n\n".join((HEAD.strip(), summary_table(rows), markdown.table(lines), sentences)) + "\n"


def written(text: str, part: str) -> str:
    """`text` with `part` between its marks."""
    return markdown.between(BEGIN, END, text, part)


if __name__ == "__main__":
    found = published_rows()
    write_text(page(found), PAGE)
    write_text(written(ACCURACY.read_text(encoding="utf-8"), summary_table(found)), ACCURACY)
