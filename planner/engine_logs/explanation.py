"""What was printed beside what is planned, line by line, and what would make it fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from planner.engine_logs.read import EngineLog
from planner.format import gib, percent
from planner.report import write_csv
from planner.result import Estimate

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One quantity: theirs as printed, ours as planned; None where one side has none."""

    item: str
    unit: Literal["bytes", "count"]
    theirs: float | None
    ours: float | None
    why: str = ""
    quoted: str = ""

    @property
    def difference(self) -> float | None:
        """Theirs − ours."""
        return None if self.theirs is None or self.ours is None else self.theirs - self.ours

    def shown(self, number: float | None, *, signed: bool = False) -> str:
        """A number of this line for people."""
        if number is None:
            return "–"
        if self.unit == "bytes":
            return f"{'+' if signed and number > 0 else ''}{gib(number)}"
        text = f"{number:+,.0f}" if signed else f"{number:,.0f}"
        return text if float(number).is_integer() else f"{number:{'+' * signed},.2f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """A change to how the engine is started, and what the planner says it does."""

    change: str
    effect: str
    fits: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """A log read, and laid beside an estimate where model and GPU are known.

    `fits`: whether one sequence of the longest length finds room by what was printed, else by the
    plan; None where neither says. `gpu_known`: the log or its reader says which;
    `gpus_alike`: all that the log's memory may be of, where only that is said.
    """

    log: EngineLog
    title: str
    verdict: str
    lines: tuple[Line, ...]
    remedies: tuple[Remedy, ...]
    notes: tuple[str, ...]
    estimate: Estimate | None
    fits: bool | None
    gpu_known: bool
    gpus_alike: tuple[str, ...] = ()

    def explain(self) -> str:
        """In words, one line a quantity."""
        rows = [
            (
                line.item,
                line.shown(line.theirs),
                line.shown(line.ours),
                line.shown(line.difference, signed=True),
                line.why,
            )
            for line in self.lines
        ]
        head = ("", "printed", "planned", "difference", "why")
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(4)]
        out = [self.title, self.verdict]
        for row in (head, *rows):
            cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]
            out.append(f"  {'  '.join(cells)}".rstrip())
        if self.remedies:
            out.append("What would help, by the planner:")
            out += [f"  {r.change}: {r.effect}" for r in self.remedies]
        out += [f"  note: {note}" for note in self.notes]
        return "\n".join(out)

    def table(self) -> pd.DataFrame:
        """item, unit, printed, planned, difference, relative_difference, why, quoted."""
        import pandas as pd

        rows = []
        for line in self.lines:
            relative = None
            if line.difference is not None and line.ours:
                relative = line.difference / line.ours
            rows.append(
                [
                    *(line.item, line.unit, line.theirs, line.ours),
                    *(line.difference, relative, line.why, line.quoted),
                ]
            )
        columns = [
            *("item", "unit", "printed", "planned"),
            *("difference", "relative_difference", "why", "quoted"),
        ]
        return pd.DataFrame(rows, columns=columns)

    def to_csv(self, path: str | Path) -> None:
        """Write the table as CSV, safe to open in a spreadsheet."""
        write_csv(self.table(), path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        e, log = self.estimate, self.log
        return {
            "title": self.title,
            "verdict": self.verdict,
            "fits": self.fits,
            "version": log.version,
            "failure": log.failure,
            "model": None if e is None else e.model.name,
            "gpu": None if e is None else e.gpu.name,
            "tensor_parallel": None if e is None else e.deploy.tensor_parallel,
            "pipeline_parallel": None if e is None else e.deploy.pipeline_parallel,
            "lines": [
                {
                    "item": line.item,
                    "unit": line.unit,
                    "printed": line.theirs,
                    "planned": line.ours,
                    "difference": line.difference,
                    "why": line.why,
                    "quoted": line.quoted,
                }
                for line in self.lines
            ],
            "remedies": [
                {"change": r.change, "effect": r.effect, "fits": r.fits} for r in self.remedies
            ],
            "notes": list(self.notes),
        }


def close(theirs: float, ours: float, *, slack: float = 0.01, least: float = 0.02 * 2**30) -> bool:
    """Within 1 %, or 0.02 GiB: what two decimals of GiB and versions apart let hope for."""
    return abs(theirs - ours) <= max(slack * abs(ours), least)


def off_by(theirs: float, ours: float) -> str:
    """How far theirs is from ours, in percent."""
    return percent((theirs - ours) / ours) if ours else "from nothing"
