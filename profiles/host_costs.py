"""Measurements → what the host costs: seconds of each op, a factor an engine, how far both vary.

Host ops were timed in runs of some seconds, one op after the other, on a processor that others use
too: it is half as fast again in one second as in the next. The first run that timed an op is the
yardstick; a later run's ops are put at its speed by what the ops next to them took in both. Runs
that have no op in common are taken to have met the same host.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

import planner
from planner.catalog.gpus import Gpu
from planner.timing.calibration import HostCost
from planner.timing.host_cost import Engine, unscaled_seconds
from profiles.compare import passes_of_record
from profiles.microbench.op_record import OpRecord
from profiles.records import Record

BOUND = 1.25
"""A pass that takes so much longer than its kernels waits for the host."""
BESIDE_S, NEIGHBOURS = 0.5, 7
"""Ops that were timed so soon before or after one, and in an earlier run too, say how fast the host
was then; where there are none of them, so many of the nearest do.
"""
APART_S = 60.0
"""Host ops that were timed so long one after the other are of two runs."""

HostRows = Sequence[tuple[float, float, float]]
"""(measured, GPU's, host's unscaled) seconds of passes of one kind."""


def host_scale(rows: Iterable[tuple[float, float, float]]) -> float | None:
    """One factor from `HostRows`, the median; None where no pass waited for its host.

    Of a row that takes about what its kernels take the host may have been done long before.
    """
    factors = [measured / host for measured, gpu, host in rows if measured > BOUND * gpu]
    return statistics.median(factors) if factors else None


def host_part(ops: list[OpRecord], gpu: Gpu, end_to_end: list[Record]) -> dict[str, Any]:
    """The cost of issuing each op as usual, the factor of each engine, how far host times vary."""
    costs = joined_costs(ops)
    if "add" not in costs:
        return {}
    issued = [r for r in end_to_end if (r.mode, r.status) == ("eager", "ok")]
    mine = [r for r in issued if r.environment.gpu == gpu.name]
    costs = _as_usual(costs, mine)
    bare = HostCost(op_s=costs, scale={}, spread=0.0, scaled_on=(), source="records")
    scale, named, apart = dict[str, float](), list[str](), 0.0
    if any(r.host_add_s for r in mine):  # one whose host's speed nobody knows says nothing of it
        mine = [r for r in mine if r.host_add_s]
    for engine in sorted({r.runtime for r in mine}):
        passes: list[HostRows] = []
        for record in mine:
            if record.runtime == engine and record.split == "calibration" and record.step is None:
                passes += _host_rows(record, bare)
                named.append(str(record.point))
        factor = host_scale(row for rows in passes for row in rows)
        if factor is not None:
            scale[engine] = round(factor, 3)
            apart = max(apart, *(abs((host_scale(rows) or factor) / factor - 1) for rows in passes))
    return {
        "host": {
            "op_s": costs,
            "scale": scale,
            "spread": round(float(np.hypot(_spread(mine), apart)), 3),
            "scaled_on": sorted(set(named)),
            "source": "records",
        }
    }


def joined_costs(ops: Iterable[OpRecord]) -> dict[str, float]:
    """Seconds of every host op, all runs at the speed of the first."""
    found: dict[str, list[float]] = {}
    for run in _runs(ops):
        before = {op: statistics.geometric_mean(costs) for op, costs in found.items()}
        for record, cost in run:
            speed = _speed(record, run, before)
            if speed is not None:
                found.setdefault(record.op, []).append(cost / speed)
    return {op: float(f"{statistics.geometric_mean(all_):.4g}") for op, all_ in found.items()}


Timed = tuple[OpRecord, float]
"""A host op and its median."""


def _runs(ops: Iterable[OpRecord]) -> Iterator[list[Timed]]:
    """One run after the other."""
    run: list[Timed] = []
    for record in ops:
        if record.family != "host" or record.status != "ok" or record.median_s is None:
            continue
        if run and _apart_s(run[-1][0], record) > APART_S:
            yield run
            run = []
        run.append((record, record.median_s))
    if run:
        yield run


def _speed(record: OpRecord, run: Sequence[Timed], before: Mapping[str, float]) -> float | None:
    """What the host took for the ops next to one, over what they took before: 1 where nothing is
    known of them, None where nothing that was timed beside it is, and the op itself is.
    """
    known = [
        (_apart_s(record, other), cost / before[other.op])
        for other, cost in run
        if other.op in before and other is not record
    ]
    near = [ratio for apart, ratio in known if apart <= BESIDE_S]
    if not near and record.op in before:
        return None
    if not near:
        near = [ratio for _, ratio in sorted(known)[:NEIGHBOURS]]
    return statistics.median(near) if near else 1.0


def _apart_s(first: OpRecord, second: OpRecord) -> float:
    times = [datetime.fromisoformat(r.created_utc) for r in (first, second)]
    return abs((times[1] - times[0]).total_seconds())


def _as_usual(costs: dict[str, float], records: list[Record]) -> dict[str, float]:
    """Costs at the host's usual speed: the median of the additions timed here and beside the
    calibration rows.

    The run that timed the ops met the host in one of its spells.
    """
    beside = [
        statistics.median(r.host_add_s)
        for r in records
        if r.split == "calibration" and r.host_add_s
    ]
    usual = statistics.median([costs["add"], *beside]) / costs["add"]
    return {name: float(f"{usual * cost:.4g}") for name, cost in costs.items()}


def _spread(records: list[Record]) -> float:
    """90th percentile of |step / median − 1| over single decode steps: how far a host wanders."""
    off = [
        abs(step / statistics.median(s for s, _ in steps) - 1.0)
        for record in records
        if (steps := record.samples("tpot_s") if record.phase == "generation" else ())
        for step, _ in steps
    ]
    return float(np.quantile(off, 0.9)) if off else 0.3


def _host_rows(record: Record, host: HostCost) -> list[HostRows]:
    """Of each quantity of an inference record its passes, each at the speed that its host had
    right before it.
    """
    engine = Engine(
        runtime=record.runtime,
        model_type=planner.read_config(record.config).text_type,
        attention=str(record.attention).split(":")[0],
    )
    return [
        [
            (measured_s, gpu_s, unscaled_seconds(program, host.as_fast_as(add_s), engine))
            for measured_s, add_s in record.samples(quantity)
        ]
        for quantity, _, gpu_s, program in passes_of_record(record)
    ]
