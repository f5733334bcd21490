"""What others would have said, held against the same measurements as our own prediction.

`weights-only`    the parameters in the dtype of the run (2·P bytes in 16 bits) and nothing else,
                  for every peak of inference.
`naive-roofline`  the larger of FLOPs over the datasheet's peak and bytes over its bandwidth, each
                  pass as a whole, P_a the active parameters:
                      prefill   2·P_a·B·S FLOPs, the weights' bytes        → TTFT
                      decode    2·P_a·B FLOPs, the bytes of weights and KV → TPOT
                      training  6·P·B·S FLOPs, 8·P·B·S with checkpointing  → step
                  The bytes of the KV cache are ours: lent to it.
a peer's name     the times in data/peers/. They are of serving engines and ideal kernels, our
                  records so far of `transformers` launched op by op.

A baseline stands beside rows that we predict ourselves, so that each pair of errors is of the same
measurements.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import planner
from planner.catalog.gpus import Gpu, gpu_named
from planner.dtypes import element_bytes
from profiles import peers
from profiles.points import cache_of
from profiles.records import Record
from profiles.rows import QUANTITIES, Row, relative_error
from profiles.summaries import percentile

WEIGHTS_ONLY, NAIVE_ROOFLINE = "weights-only", "naive-roofline"
PEAKS = ("peak_live_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "device_used_bytes")


@dataclass(frozen=True, kw_only=True, slots=True)
class Baseline:
    """What one method says of one row; `planner_error` is our own error there."""

    method: str
    device: str
    suite: str | None
    split: str | None
    model: str
    phase: str
    quantity: str
    predicted: float
    measured: float
    relative_error: float
    planner_error: float
    record: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BaselineSummary:
    """A method's absolute errors of one quantity in one split, and ours on the same rows."""

    device: str
    method: str
    quantity: str
    split: str | None
    n: int
    mean_abs_error: float
    p90_abs_error: float
    worst_abs_error: float
    planner_mean_abs_error: float
    planner_p90_abs_error: float
    planner_worst_abs_error: float


def baselines(records: Iterable[Record], rows: Iterable[Row]) -> list[Baseline]:
    """Each method's answer to each predicted row that it has an answer to."""
    of = {record.id: record for record in records}
    found = []
    for row in rows:
        if row.relative_error is None:
            continue
        for method, prediction in _answers(of[row.record], row).items():
            error = relative_error(prediction, row.measured)
            if error is not None:
                found.append(_baseline(row, method, prediction, error, row.relative_error))
    return found


def baseline_summary(found: Iterable[Baseline]) -> list[BaselineSummary]:
    """Mean, p90 and worst of each method by device, quantity and split."""
    groups: dict[tuple[str, str, str | None, str], list[Baseline]] = {}
    for one in found:
        groups.setdefault((one.device, one.quantity, one.split, one.method), []).append(one)
    order = sorted(groups, key=lambda g: (g[0], QUANTITIES.index(g[1]), g[2] or ""))
    return [_summarise(*group, groups[group]) for group in order]


def _answers(record: Record, row: Row) -> Mapping[str, float]:
    if record.environment.gpu is None:
        return {}
    if row.quantity in PEAKS:
        return {} if record.step is not None else {WEIGHTS_ONLY: _weights_bytes(record)}
    answers = {}
    if row.quantity in ("ttft_s", "tpot_s", "replay_s", "step_s"):
        answers[NAIVE_ROOFLINE] = _roofline_s(record, row.quantity)
    ran = (record.model, record.environment.gpu, record.dtype)
    if record.is_plain and ran == (peers.MODEL, peers.GPU, peers.DTYPE):
        told = "tpot_s" if row.quantity == "replay_s" else row.quantity
        sizes = (record.batch, record.prompt_tokens, told)
        answers |= peers.figures_s().get(sizes, {})
    return answers


def _roofline_s(record: Record, quantity: str) -> float:
    model, gpu = _model(record), gpu_named(record.environment.gpu or "")
    weights, active = _weights_bytes(record), model.active_parameter_count
    tokens = record.batch * record.prompt_tokens
    if record.step is not None:
        per_token = 8 if record.step.get("checkpointing") == "full" else 6
        return _slower_s(gpu, record.dtype, per_token * active * tokens, weights)
    if quantity == "ttft_s":
        return _slower_s(gpu, record.dtype, 2 * active * tokens, weights)
    cache = planner.kv_cache_bytes(
        model,
        batch=record.batch,
        context_tokens=record.prompt_tokens + record.output_tokens - 1,
        dtype=record.kv_dtype,
        runtime=record.runtime,
        cache=cache_of(record),
        compute_dtype=record.dtype,
    )
    return _slower_s(gpu, record.dtype, 2 * active * record.batch, weights + cache)


def _slower_s(gpu: Gpu, dtype: str, flops: int, moved_bytes: int) -> float:
    return max(flops / gpu.flops_per_s(dtype), moved_bytes / gpu.memory_bandwidth_bytes_per_s)


def _weights_bytes(record: Record) -> int:
    return _model(record).parameter_count * element_bytes(record.dtype)


def _model(record: Record) -> planner.Model:
    return planner.read_config(record.config)


def _baseline(
    row: Row, method: str, prediction: float, error: float, planner_error: float
) -> Baseline:
    return Baseline(
        method=method,
        device=row.device,
        suite=row.suite,
        split=row.split,
        model=row.model,
        phase=row.phase,
        quantity=row.quantity,
        predicted=prediction,
        measured=row.measured,
        relative_error=error,
        planner_error=planner_error,
        record=row.record,
    )


def _summarise(
    device: str, quantity: str, split: str | None, method: str, members: list[Baseline]
) -> BaselineSummary:
    theirs = sorted(abs(one.relative_error) for one in members)
    ours = sorted(abs(one.planner_error) for one in members)
    return BaselineSummary(
        device=device,
        method=method,
        quantity=quantity,
        split=split,
        n=len(members),
        mean_abs_error=statistics.fmean(theirs),
        p90_abs_error=percentile(theirs, 0.9),
        worst_abs_error=theirs[-1],
        planner_mean_abs_error=statistics.fmean(ours),
        planner_p90_abs_error=percentile(ours, 0.9),
        planner_worst_abs_error=ours[-1],
    )
