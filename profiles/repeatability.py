"""How far two measurements of one point are apart: below that, no prediction can be judged.

Between *runs*: the same work on the same kind of device with the same software, measured again by
another process, whichever suite asked for it. Between *passes*: the timed passes of one run. A
spread is (largest − smallest) / median, so of two measurements it is their distance.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from profiles.compare import measured
from profiles.records import Record, canonical
from profiles.rows import QUANTITIES

Between = Literal["runs", "passes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeat:
    """One quantity of one point, measured `n` times."""

    device: str
    model: str
    phase: str
    quantity: str
    between: Between
    n: int
    median: float
    spread: float
    records: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Repeatability:
    """The spreads of one quantity on one device, over `points` repeated points."""

    device: str
    quantity: str
    between: Between
    points: int
    mean_spread: float
    worst_spread: float


def repeats(records: Iterable[Record]) -> list[Repeat]:
    """Whatever was measured at least twice, between runs first."""
    fine = [record for record in records if record.status == "ok"]
    points: dict[str, list[Record]] = {}
    for record in fine:
        points.setdefault(_point(record), []).append(record)
    between_runs = [
        _repeat(members, quantity, "runs", values)
        for members in points.values()
        for quantity, values in _columns(members).items()
    ]
    between_passes = [
        _repeat([record], quantity, "passes", values)
        for record in fine
        for quantity, values in _passes(record).items()
    ]
    return [repeat for repeat in (*between_runs, *between_passes) if repeat is not None]


def repeatability(found: Iterable[Repeat]) -> list[Repeatability]:
    """Mean and worst spread by device, kind of repetition and quantity."""
    groups: dict[tuple[str, Between, str], list[float]] = {}
    for repeat in found:
        key = (repeat.device, repeat.between, repeat.quantity)
        groups.setdefault(key, []).append(repeat.spread)
    order = sorted(groups, key=lambda g: (g[0], g[1] != "runs", QUANTITIES.index(g[2])))
    return [
        Repeatability(
            device=device,
            quantity=quantity,
            between=between,
            points=len(groups[device, between, quantity]),
            mean_spread=statistics.fmean(groups[device, between, quantity]),
            worst_spread=max(groups[device, between, quantity]),
        )
        for device, between, quantity in order
    ]


def _point(record: Record) -> str:
    """What makes two records repetitions of each other: all that was asked for, and what ran it.

    A suite's point has asked by its name, which attention is part of: that what ran is unknown (of
    a record read off a history) makes it no other point.
    """
    environment = record.environment
    step = {} if record.step is None else record.step
    return canonical(
        {
            "device": environment.gpu or environment.device_name,
            "cpu": environment.cpu if environment.device == "cpu" else None,
            "torch": environment.torch,
            "config": record.config_hash,
            "runtime": (record.runtime, record.runtime_version, record.mode),
            "asked": record.point or record.attention,
            "phase": (record.phase, record.logits),
            "sizes": (record.batch, record.prompt_tokens, record.output_tokens),
            "dtypes": (record.dtype, record.kv_dtype),
            "cache": (record.cache, record.padded),
            "step": {name: value for name, value in step.items() if value is not None},
        }
    )


def _columns(members: Sequence[Record]) -> dict[str, list[float]]:
    """The values of each quantity over several records."""
    columns: dict[str, list[float]] = {}
    for record in members:
        for quantity, value in measured(record).items():
            columns.setdefault(quantity, []).append(value)
    return columns


def _passes(record: Record) -> Mapping[str, Sequence[float]]:
    """The values of each time over the passes of one record, in the terms of `measured`."""
    if record.phase == "prefill":
        return {"ttft_s": record.step_s}
    if record.mode == "graph":
        return {"replay_s": record.step_s}
    if record.phase != "generation":
        return {"step_s": record.step_s}
    return {"ttft_s": record.ttft_s, "tpot_s": record.repeat_tpot_s}


def _repeat(
    members: Sequence[Record], quantity: str, between: Between, values: Sequence[float]
) -> Repeat | None:
    """None where there was one measurement, or nothing to divide by."""
    if len(values) < 2:
        return None
    middle = statistics.median(values)
    apart = max(values) - min(values)
    if not middle and apart:
        return None
    first = members[0]
    return Repeat(
        device=first.environment.gpu or first.environment.device_name,
        model=first.model,
        phase=first.phase,
        quantity=quantity,
        between=between,
        n=len(values),
        median=middle,
        spread=apart / middle if middle else 0.0,
        records=tuple(record.id for record in members),
    )
