"""Where the time of a pass goes: a row for every kind of op, the longest first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from planner.model import Model
from planner.program import Dims, Program
from planner.timing.clock import OpTime, Speed
from planner.timing.collectives import collective_seconds, collectives
from planner.timing.fresh_pages import PAGES_ERROR, given_seconds
from planner.timing.passes import Passes
from planner.timing.roofline import op_times

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, slots=True)
class OpRow:
    """One kind of op of a pass; `seconds` are of one call, `total_s` of all of them.

    `bound_by`: compute or memory, whichever ceiling takes longer, or latency where both together
    leave most of the time unexplained.
    """

    op: str
    family: str
    count: int
    seconds: float
    total_s: float
    flops: float
    moved_bytes: float
    bound_by: str
    basis: str
    error: float


def op_rows(program: Program, dims: Dims, speed: Speed, clock: float = 1.0) -> list[OpRow]:
    """All kinds of op of a pass, at a clock that the power cap allows (power.py)."""
    rows = [_row(made, speed, clock) for made in op_times(program, dims, speed)]
    if speed.calibration is not None and speed.calibration.pages is not None:
        rows.append(_pages(given_seconds(program, dims, speed.calibration)))
    return sorted(rows, key=lambda row: -row.total_s)


def collective_rows(program: Program, dims: Dims, speed: Speed, shards: int) -> list[OpRow]:
    """What a communicator runs beside the kernels of sharded training, which hide most of it."""
    counts: dict[tuple[str, float], int] = {}
    for segment in program.segments:
        for kernel, size in collectives(segment, dims, shards):
            counts[kernel, size] = counts.get((kernel, size), 0) + segment.count
    rows = []
    for (kernel, size), count in counts.items():
        seconds, error = collective_seconds(kernel, size, shards, speed)
        row = OpRow(
            op=kernel,
            family="communication",
            count=count,
            seconds=float(seconds),
            total_s=count * float(seconds),
            flops=0.0,
            moved_bytes=size,
            bound_by="communication",
            basis="uncalibrated" if speed.calibration is None else "interpolated",
            error=error,
        )
        rows.append(row)
    return rows


def op_table(passes: Passes, make: Callable[[Model], Program], dims: Dims) -> pd.DataFrame:
    """The rows of a pass through all stages, as a table."""
    import pandas as pd

    clock = float(passes.timed(make, dims).clock)
    programs, speed, sharding = map(make, passes.stages), passes.speed, passes.setting.sharding
    rows = []
    for program in programs:
        rows += op_rows(program, dims, speed, clock)
        if sharding is not None:
            rows += collective_rows(program, dims, speed, sharding.shards)
    columns = list(OpRow.__dataclass_fields__)
    table = pd.DataFrame([asdict(row) for row in rows], columns=columns)
    return table.sort_values("total_s", ascending=False, ignore_index=True)


def _pages(seconds: float) -> OpRow:
    """What a CPU's system does before an op can write: no op's own, and once for all of them."""
    return OpRow(
        op="pages given anew",
        family="pages",
        count=1,
        seconds=seconds,
        total_s=seconds,
        flops=0.0,
        moved_bytes=0.0,
        bound_by="memory",
        basis="interpolated",
        error=PAGES_ERROR,
    )


def _row(made: OpTime, speed: Speed, clock: float) -> OpRow:
    seconds = float(made.at(clock))
    compute = float(made.flops) / speed.gpu.flops_per_s(speed.product_dtype or speed.dtype)
    memory = float(made.moved_bytes) / speed.gpu.memory_bandwidth_bytes_per_s
    bound = "compute" if compute > memory else "memory"
    return OpRow(
        op=made.timed.op.name,
        family=made.family,
        count=made.timed.count,
        seconds=seconds,
        total_s=made.timed.count * seconds,
        flops=float(made.flops),
        moved_bytes=float(made.moved_bytes),
        bound_by=bound if compute + memory > 0.4 * seconds else "latency",
        basis=made.basis,
        error=made.error,
    )
