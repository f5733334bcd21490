"""Writes docs/accuracy.md's tables from the committed records: `python -m tools.accuracy_table`.

README gets the held-out points in a few lines. Run it after a prediction or a record has
changed; a test holds the pages against what it gives. A device has a table: its held-out points
beside those that constants may be fitted on and those that were measured outside the suites.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from planner.catalog.gpus import gpus
from planner.format import of_quantity
from planner.report import write_text
from profiles import records
from profiles.compare import compare
from profiles.records import Record
from profiles.repeatability import Repeatability, repeatability, repeats
from profiles.rows import QUANTITIES, Row
from profiles.summaries import Summary, summary
from tools import markdown

ROOT = Path(__file__).parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "accuracy.md"
BEGIN = "<!-- accuracy: written by `python -m tools.accuracy_table` -->"
END = "<!-- /accuracy -->"
SHORT_BEGIN = "<!-- held out: written by `python -m tools.accuracy_table` -->"
SHORT_END = "<!-- /held out -->"
SHORT = (
    "peak_live_bytes",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "device_used_bytes",
    "ttft_s",
    "step_s",
    "replay_s",
    "tpot_s",
)
"""What README shows of them."""
WAITING = ("ttft_s", "step_s", "tpot_s")
"""Times that may wait for a host."""


def accuracy(found: Sequence[Record]) -> str:
    """The part of the page between the marks: GPUs first."""
    rows = compare(found)
    devices = by_name({row.device for row in rows})
    return "\n\n".join(
        of_device(
            device,
            [r for r in found if (r.environment.gpu or r.environment.device_name) == device],
            [row for row in rows if row.device == device],
        )
        for device in devices
    )


def held_out(found: Sequence[Record]) -> str:
    """README's table: of each device the points that nothing was fitted on, the CPU's last.

    Times that may wait for a host are shown once more for the runs that read its speed before every
    step, where some of a device's did and some did not.
    """
    rows = [row for row in compare(found) if row.split == "held-out"]
    read = {record.id for record in found if record.reads_host_each_step}
    lines: list[Sequence[str]] = [
        ("device", "quantity", "n", "mean \\|error\\|", "p90", "worst"),
        ("---", "---", "--:", "--:", "--:", "--:"),
    ]
    for device in by_name({row.device for row in rows}):
        of = {s.quantity: s for s in summary([row for row in rows if row.device == device])}
        own = [row for row in rows if row.device == device and row.record in read]
        again = {s.quantity: s for s in summary(own) if s.quantity in WAITING}
        for name in SHORT:
            if name not in of:
                continue
            lines.append((label_of(device), of_quantity(name), *errors(of[name])))
            if name in again and again[name].n < of[name].n:
                told = f"… {of_quantity(name)}, host read at each step"
                lines.append((label_of(device), told, *errors(again[name])))
    return markdown.table(lines)


def by_name(devices: Iterable[str]) -> list[str]:
    """GPUs first."""
    return sorted(devices, key=lambda name: (name == "cpu", name))


def label_of(device: str) -> str:
    """A device in the tables."""
    if device == "cpu":
        return "CPU"
    return gpus()[device].label if device in gpus() else device


def of_device(device: str, found: Sequence[Record], rows: Sequence[Row]) -> str:
    """One device: what was run, how repeatable it was, how far off the predictions were."""
    compared = {row.record for row in rows if row.predicted is not None}
    ran = [record for record in found if record.id in compared]
    refused = len({row.record for row in rows if row.predicted is None})
    left_out = f" The planner refuses {refused} more." if refused else ""
    head = (
        f"**{label_of(device)}**, {days(ran)}: {len(ran)} records of "
        f"{len({record.model for record in ran})} models; {software(ran)}.{left_out}"
    )
    spreads = repeatability(repeats(found))
    return "\n\n".join((head, again(spreads), table(summary(rows))))


def days(found: Iterable[Record]) -> str:
    """The day of the records, or the first and the last."""
    seen = sorted({record.created_utc[:10] for record in found})
    return seen[0] if len(seen) == 1 else f"{seen[0]} to {seen[-1]}"


def software(found: Sequence[Record]) -> str:
    """torch's version, and transformers' where it ran."""
    torch = sorted({f"torch {record.environment.torch}" for record in found})
    others = sorted(
        {
            f"transformers {record.environment.transformers}"
            for record in found
            if record.runtime == "transformers"
        }
    )
    return ", ".join((*torch, *others))


def again(spreads: Sequence[Repeatability]) -> str:
    """How far repeated measurements are apart: what no prediction can do better than."""
    sentences = []
    for between, what in (("runs", "Two runs of one point"), ("passes", "The passes of one run")):
        members = [spread for spread in spreads if spread.between == between]
        if members:
            listed = ", ".join(
                f"{of_quantity(m.quantity)} {share(m.mean_spread)} (worst {share(m.worst_spread)})"
                for m in members
            )
            sentences.append(f"{what} are apart by, on average: {listed}.")
        elif between == "runs":
            sentences.append("No point was measured by two runs yet.")
    return "Repeatability first. " + " ".join(sentences)


SIDES: dict[str | None, str] = {
    "held-out": "held-out n",
    "calibration": "calibration n",
    None: "outside the suites n",
}


def table(summaries: Sequence[Summary]) -> str:
    """Quantity × n, mean, p90 and worst of the absolute error, of each split that there is."""
    there = {one.split for one in summaries if one.n}
    sides = [side for side in SIDES if side in there]
    figures = ("mean \\|error\\|", "p90", "worst")
    counts = ["n"] if sides == [None] else [SIDES[side] for side in sides]
    head = [name for count in counts for name in (count, *figures)]
    lines = [["quantity", *head], ["---", *["--:"] * len(head)]]
    of = {(s.quantity, s.split): s for s in summaries}
    for quantity in QUANTITIES:
        cells = [cell for side in sides for cell in errors(of.get((quantity, side)))]
        if any(cells):
            lines.append([of_quantity(quantity), *cells])
    return markdown.table(lines)


def errors(one: Summary | None) -> list[str]:
    """n, mean, p90, worst; empty where nothing was compared."""
    if one is None or not one.n:
        return [""] * 4
    return [f"{one.n}", *map(share, (one.mean_abs_error, one.p90_abs_error, one.worst_abs_error))]


def share(fraction: float | None) -> str:
    """A size of an error: "0" is exact to the byte."""
    if not fraction:
        return "0"
    return "< 0.01 %" if fraction < 0.0001 else f"{fraction:.2%}".replace("%", " %")


def written(text: str, part: str) -> str:
    """`text` of the page with `part` between its marks."""
    return markdown.between(BEGIN, END, text, part)


def shortened(text: str, part: str) -> str:
    """`text` of README with `part` between its marks."""
    return markdown.between(SHORT_BEGIN, SHORT_END, text, part)


def committed() -> list[Record]:
    """The records of profiles/data/."""
    found, problems = records.load(sorted(records.DATA.glob("*.jsonl")))
    for problem in problems:
        print(problem, file=sys.stderr)
    return found


if __name__ == "__main__":
    os.environ["PLANNER_CALIBRATION"] = ""  # the catalogue alone
    here = committed()
    write_text(written(PAGE.read_text(encoding="utf-8"), accuracy(here)), PAGE)
    write_text(shortened(README.read_text(encoding="utf-8"), held_out(here)), README)
