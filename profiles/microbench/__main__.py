"""python -m profiles.microbench --budget 170 --out measurements/microbench/here.jsonl."""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from pathlib import Path

from planner import ConfigError
from profiles.microbench.op_record import DEVICE_LOST, load, merged
from profiles.microbench.point import FAMILIES
from profiles.microbench.table import table

_started_s = time.perf_counter()
"""When the run began: the import of torch counts, what a caller did before does not."""


def main(arguments: list[str] | None = None) -> int:
    """Run, print progress while it runs and a table at the end; 0 where any point came out."""
    parser = argparse.ArgumentParser(prog="python -m profiles.microbench", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cuda or cpu")
    parser.add_argument("--budget", type=float, default=480.0, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=Path("measurements/microbench/here.jsonl"))
    parser.add_argument("--family", action="append", default=[], choices=FAMILIES)
    parser.add_argument("--missing", action="store_true", help="only what the file lacks")
    parser.add_argument("--show", action="store_true", help="print the file's table, measure none")
    asked = parser.parse_args(arguments)
    if arguments is not None:
        global _started_s
        _started_s = time.perf_counter()
    warnings.simplefilter("ignore")  # torch says at length why a backend does not take a shape
    try:
        if not asked.show:
            from profiles.microbench.run import run

            records = run(
                asked.device,
                budget_s=_left_s(asked.budget),
                out=asked.out,
                only_missing=asked.missing,
                families=asked.family,
                on_progress=_progress,
            )
            if records and records[-1].note == DEVICE_LOST and _left_s(asked.budget) > 10:
                _start_again(asked)
        stored = list(merged(load(asked.out).ops).values())
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    for line in table(stored):
        print(line)
    print(f"{len(stored)} points in {asked.out}, {time.perf_counter() - _started_s:.0f} s")
    return 0 if any(record.status == "ok" for record in stored) else 1


def _left_s(budget_s: float) -> float:
    return budget_s - (time.perf_counter() - _started_s)


def _start_again(asked: argparse.Namespace) -> None:
    """The same run in a new process image: what lost the device is passed over."""
    print(f"{DEVICE_LOST}: starting again", file=sys.stderr, flush=True)
    families = [option for family in asked.family for option in ("--family", family)]
    options = ["--device", asked.device, "--budget", f"{_left_s(asked.budget):.0f}"]
    command = [sys.executable, "-m", "profiles.microbench", "--missing", *options, *families]
    os.execv(sys.executable, [*command, "--out", str(asked.out)])


def _progress(done: int, total: int, what: str) -> None:
    if done % 25 == 0 or what == "done":
        took_s = time.perf_counter() - _started_s
        print(f"{took_s:6.1f} s  {done}/{total}  {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
