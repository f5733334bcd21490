"""Writes docs/time.md's tables of whole models: `python -m tools.time_table`.

Held-out records of GPUs: all of a quantity, and those that kernels bind as planned; beside them the
runs that read their host's speed before every step (replayed steps have no host). How near any one
number a point could come to points that ran several times. What other tools print of Llama-3.1-8B,
on the same measurements.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from planner import ConfigError
from planner.format import of_quantity
from planner.report import write_text
from planner.timing.latency import Latency
from profiles.baselines import baselines
from profiles.compare import compare, estimate_of
from profiles.records import Record
from profiles.repeatability import repeats
from profiles.rows import Row
from tools import markdown
from tools.accuracy_table import committed, share

PAGE = Path(__file__).parents[1] / "docs" / "time.md"
BEGIN = "<!-- whole models: written by `python -m tools.time_table` -->"
END = "<!-- /whole models -->"
PEERS_BEGIN = "<!-- peers: written by `python -m tools.time_table` -->"
PEERS_END = "<!-- /peers -->"
PEERS = {
    "aiconfigurator-trtllm": "aiconfigurator (TensorRT-LLM)",
    "aiconfigurator-vllm": "aiconfigurator (vLLM)",
    "LLM-Viewer-fa": "LLM-Viewer, flash",
    "llm-analysis": "llm-analysis",
    "LLM-Viewer": "LLM-Viewer",
    "GenZ": "GenZ",
}
TIMES = ("ttft_s", "step_s", "replay_s", "tpot_s", "new_tpot_s")
ASKED = TIMES[:-1]
"""What people plan by; the last is what a process waits for once a length."""
HOST = "host"


def whole_models(found: Sequence[Record]) -> str:
    """The part of the page between the marks."""
    of_gpus = [record for record in found if record.environment.device == "cuda"]
    paired = {r.id for r in of_gpus if r.reads_host_each_step or r.mode == "graph"}
    rows = [row for row in compare(of_gpus) if row.relative_error is not None]
    held_out = [row for row in rows if row.split == "held-out" and row.quantity in TIMES]
    latencies = _latencies(of_gpus)
    lines: list[Sequence[str]] = [
        ("held-out", "n", "mean \\|error\\|", "p90", "host read: n", "mean", "p90"),
        ("---", *["--:"] * 6),
    ]

    def add(name: str, members: Sequence[Row]) -> None:
        if members:
            read = [row for row in members if row.record in paired]
            lines.append((name, *_figures(members), *_figures(read)))

    def by_kernels(members: Sequence[Row]) -> list[Row]:
        return [row for row in members if _bound(row, latencies[row.record]) != HOST]

    for quantity in TIMES:
        own = [row for row in held_out if row.quantity == quantity]
        add(of_quantity(quantity), own)
        if quantity in ("ttft_s", "step_s"):
            add(f"… {of_quantity(quantity)}, bound by kernels", by_kernels(own))
    asked = [row for row in held_out if row.quantity in ASKED]
    names = ", ".join(map(of_quantity, ASKED[:-1]))
    add(f"{names} and {of_quantity(ASKED[-1])}", asked)
    add("… bound by kernels", by_kernels(asked))
    told = (markdown.table(lines), nearest(of_gpus, rows), joules(of_gpus, latencies))
    return "\n\n".join(told)


def beside_peers(found: Sequence[Record]) -> str:
    """Mean errors without their sign of each tool and of ours, over the same held-out rows."""
    of_gpus = [record for record in found if record.environment.device == "cuda"]
    told = [b for b in baselines(of_gpus, compare(of_gpus)) if b.split == "held-out"]
    lines: list[Sequence[str]] = [
        ("Llama-3.1-8B, held-out", "n", "ours", *PEERS.values()),
        ("---", *["--:"] * (2 + len(PEERS))),
    ]
    for quantity in ("replay_s", "ttft_s"):
        rows = {
            name: [b for b in told if (b.method, b.quantity) == (name, quantity)] for name in PEERS
        }
        ours = [abs(b.planner_error) for b in rows[next(iter(PEERS))]]
        theirs = [share(fmean(abs(b.relative_error) for b in of)) for of in rows.values()]
        lines.append((of_quantity(quantity), str(len(ours)), share(fmean(ours)), *theirs))
    return markdown.table(lines)


def nearest(found: Sequence[Record], rows: Sequence[Row]) -> str:
    """Of eager decoding: the error of the best number a point, chosen with all runs in sight."""
    of = {row.record: row for row in rows if row.quantity == "tpot_s"}
    best, ours = list[float](), list[float]()
    points = 0
    for repeat in repeats(found):
        if (repeat.quantity, repeat.between) != ("tpot_s", "runs"):
            continue
        runs = [of[record] for record in repeat.records if record in of]
        if len(runs) < 2:
            continue
        points += 1
        seen = [row.measured for row in runs]
        best += [best_error(seen)] * len(runs)
        ours += [abs(row.relative_error or 0.0) for row in runs]
    return (
        f"On the {points} points whose TPOT was measured by several runs the best single number a "
        f"point, chosen with all runs in sight, would miss by {share(fmean(best))} in the mean; "
        f"ours miss by {share(fmean(ours))}."
    )


def joules(found: Sequence[Record], latencies: Mapping[str, Latency]) -> str:
    """Energy of whole runs by NVML's counter; a graph's window holds its captures, too."""
    off = []
    for record in found:
        planned = latencies.get(record.id)
        counted = record.energy_j and record.phase != "decode" and record.split == "held-out"
        if counted and planned is not None and planned.energy_j is not None:
            runs = len(record.ttft_s or record.step_s)
            off.append(abs(runs * planned.energy_j / (record.energy_j or 1.0) - 1.0))
    mean, p90 = share(fmean(off)), share(float(np.quantile(off, 0.9)))
    return (
        f"Joules of {len(off)} held-out runs that lasted a second or more, by NVML's counter: "
        f"{mean} off in the mean, {p90} p90."
    )


def best_error(seen: Sequence[float]) -> float:
    """min over c of mean |c / m − 1|: convex, with its corners at what was measured."""
    return min(fmean(abs(c / m - 1.0) for m in seen) for c in seen)


def _latencies(found: Iterable[Record]) -> dict[str, Latency]:
    made = {}
    for record in found:
        try:
            made[record.id] = estimate_of(record).latency
        except ConfigError:
            continue
    return made


def _bound(row: Row, latency: Latency) -> str:
    decodes = row.quantity in ("tpot_s", "new_tpot_s", "replay_s")
    return latency.decode_bound_by if decodes else latency.prefill_bound_by


def _figures(rows: Sequence[Row]) -> tuple[str, str, str]:
    off = [abs(row.relative_error or 0.0) for row in rows]
    if not off:
        return "0", "–", "–"
    return f"{len(off)}", share(fmean(off)), share(float(np.quantile(off, 0.9)))


def written(text: str, found: Sequence[Record]) -> str:
    """`text` of the page with its tables between their marks."""
    text = markdown.between(BEGIN, END, text, whole_models(found))
    return markdown.between(PEERS_BEGIN, PEERS_END, text, beside_peers(found))


if __name__ == "__main__":
    os.environ["PLANNER_CALIBRATION"] = ""  # the catalogue alone
    write_text(written(PAGE.read_text(encoding="utf-8"), committed()), PAGE)
