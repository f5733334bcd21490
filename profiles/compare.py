"""Records beside what the planner predicts for the same work: the only place where the two meet.

The prediction is rebuilt from the record itself: its config, its workload, its device and runtime.
So an old record is always set against today's planner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

import planner
from planner import ConfigError
from planner.catalog.here import as_on
from planner.program import Dims, Program
from planner.reserved import AllocatorPlan
from planner.result import Memory
from planner.runtimes import runtime_named
from planner.runtimes.base import clock_capacity
from planner.timing.latency import Latency
from planner.timing.passes import passes_of
from planner.timing.roofline import pass_cost
from profiles.points import cache_of, planned_dtype
from profiles.record_cpu import processor_of
from profiles.records import Record
from profiles.rows import QUANTITIES, Row, relative_error, to_frame
from profiles.summaries import Summary, summary

__all__ = [
    "QUANTITIES",
    "Row",
    "Summary",
    "compare",
    "estimate_of",
    "measured",
    "predicted",
    "summary",
    "to_frame",
]


def compare(
    records: Iterable[Record],
    *,
    traced: bool = False,
    on_problem: Callable[[str], None] | None = None,
) -> list[Row]:
    """A row for each quantity that was measured and is predicted.

    A record that the planner refuses keeps its rows with predicted=None, and `on_problem` is told
    why; so it is of records that did not end "ok", which have no rows, and of those that cannot be
    traced. `traced` runs every record's module on fake tensors: a second or so each.
    """
    records, rows = list(records), list[Row]()
    for record in records:
        where = f"record {record.id} ({record.model}, {record.phase})"
        if record.status != "ok":
            _tell(on_problem, f"{where}: {record.status}")
            continue
        found = measured(record)
        try:
            expected: dict[str, float | None] = predicted(record)
        except ConfigError as error:
            _tell(on_problem, f"{where} is not predicted: {error}")
            rows += [_row(record, quantity, None, value) for quantity, value in found.items()]
        else:
            rows += [
                _row(record, quantity, prediction, value)
                for quantity, value in found.items()
                if (prediction := expected[quantity]) is not None
            ]
    if not traced:
        return rows
    of = {record.id: record for record in records}
    shapes = {name: _traced(of[name], on_problem) for name in {row.record for row in rows}}
    return [replace(row, traced=shapes[row.record].get(row.quantity)) for row in rows]


def _traced(record: Record, on_problem: Callable[[str], None] | None) -> dict[str, int]:
    from profiles.traced_record import traced

    try:
        return traced(record)
    except ConfigError as error:
        where = f"record {record.id} ({record.model}, {record.phase})"
        _tell(on_problem, f"{where} is not traced: {error}")
        return {}


def measured(record: Record) -> dict[str, float]:
    """The quantities that a record has, in the planner's terms.

    The driver's figure is the whole device's: what others used before this process touched it goes
    off. A prefill's median is a TTFT; a decode record's median step is its step_s, or its replay_s
    where a CUDA graph replays it.
    """
    used = record.device_used_peak_bytes
    others = record.device_used_before_bytes or 0
    values: dict[str, float | None] = {
        "weights_bytes": record.weights_bytes,
        "kv_cache_bytes": record.kv_cache_bytes,
        "gradients_bytes": record.gradients_bytes,
        "optimizer_bytes": record.optimizer_bytes,
        "peak_live_bytes": record.peak_live_bytes,
        "peak_allocated_bytes": record.peak_allocated_bytes,
        "peak_reserved_bytes": record.peak_reserved_bytes,
        "device_used_bytes": None if used is None else used - others,
        "ttft_s": record.median_ttft_s,
        "tpot_s": record.median_tpot_s,
        "new_tpot_s": record.new_tpot_s,
        "replay_s": record.median_step_s if record.mode == "graph" else None,
        "step_s": record.median_step_s if _stepped(record) else None,
    }
    return {quantity: value for quantity, value in values.items() if value is not None}


def _stepped(record: Record) -> bool:
    return record.phase == "training" or (record.phase == "decode" and record.mode == "eager")


def predicted(record: Record) -> dict[str, float | None]:
    """What the planner says of a record's work; None for what it does not predict."""
    estimate = estimate_of(record)
    memory, latency, tpot_s, new_tpot_s = estimate.memory, estimate.latency, None, None
    if latency.tpot_s is not None:
        tpot_s = _beside(record, "tpot_s", estimate).tpot_s
    if record.new_tpot_s is not None:
        new = _beside(record, "new_tpot_s", estimate)
        new_tpot_s = (new.tpot_s or 0.0) + (new.new_length_s or 0.0)
    return {
        "weights_bytes": memory.weights_bytes,
        "kv_cache_bytes": memory.kv_cache_bytes,
        "gradients_bytes": memory.gradients_bytes,
        "optimizer_bytes": memory.optimizer_bytes,
        "peak_live_bytes": memory.peak_live_bytes,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "device_used_bytes": memory.device_used_bytes,
        "ttft_s": latency.ttft_s,
        "tpot_s": tpot_s,
        "new_tpot_s": new_tpot_s,
        "replay_s": latency.tpot_s,
        "step_s": latency.step_s if record.phase == "training" else latency.tpot_s,
    }


def _beside(record: Record, quantity: str, of_prompts: planner.Estimate) -> Latency:
    """The times as fast as the host was beside that quantity, not beside the prompts."""
    if record.host_add_beside_s(quantity) == record.host_add_beside_s("ttft_s"):
        return of_prompts.latency
    return estimate_of(record, quantity=quantity).latency


def estimate_of(record: Record, *, quantity: str = "ttft_s") -> planner.Estimate:
    """The estimate of a record's work on its device; ConfigError where the planner refuses it.

    What a graph replayed were the eager pass's own kernels. How fast the host issued additions
    beside `quantity` is told, where the record has it.
    """
    if record.environment.gpu is None:
        raise ConfigError(f"gpu={record.environment.device_name!r} is not in the catalogue")
    work: planner.Inference | planner.Training
    if record.step is not None:
        work = _training(record, record.step)
    else:
        work = planner.Inference(
            batch=record.batch,
            prompt_tokens=record.prompt_tokens,
            output_tokens=record.output_tokens,
            logits=record.logits,
            padded=record.padded,
        )
    deploy = planner.Deployment(
        gpu=record.environment.gpu,
        runtime=record.runtime,
        attention=record.attention.split(":")[0] if record.attention else None,
        dtype=planned_dtype(work, record.dtype),
        weight_dtype=None if record.step is None else record.step.get("weight_dtype"),
        kv_dtype=None if record.step is not None else record.kv_dtype,
        cache=cache_of(record),
        mode="captured" if record.mode == "graph" else record.mode,
        host_add_s=record.host_add_beside_s(quantity),
    )
    with as_on(processor_of(record)):
        estimate = planner.estimate(planner.read_config(record.config), work, deploy)
    return replace(estimate, memory=_as_built(estimate.memory))


def _as_built(memory: Memory) -> Memory:
    """Torch's peaks in a process that builds its model as profiles/workloads.py does."""
    if not isinstance(memory.torch, AllocatorPlan):
        return memory
    return replace(memory, torch=replace(memory.torch, from_config=True))


def passes_of_record(record: Record) -> list[tuple[str, float, float, Program]]:
    """(quantity, measured seconds, kernels' seconds, program) of a record's inference passes."""
    estimate = estimate_of(record)
    if isinstance(estimate.work, planner.Training):
        return []
    work, setting = estimate.work, estimate.setting
    rules = runtime_named(record.runtime)
    passes = passes_of(estimate.share.model, setting, record.runtime, estimate.gpu)
    found = measured(record)
    made: list[tuple[str, float, float, Program]] = []
    for quantity, make, tokens, context in (
        ("ttft_s", rules.prefill, work.prompt_tokens, work.prompt_tokens),
        ("tpot_s", rules.decode, 1, work.context_tokens),
        ("replay_s", rules.decode, 1, work.context_tokens),
    ):
        if quantity in found:
            program = make(estimate.share.model, work, setting)
            held = clock_capacity(setting, work)
            dims = Dims(batch=work.batch, tokens=tokens, context=context, capacity=held)
            gpu_s = float(pass_cost(program, dims, passes.speed).time_s)
            made.append((quantity, found[quantity], gpu_s, program))
    return made


def _training(record: Record, step: Mapping[str, Any]) -> planner.Training:
    step = dict(step)
    if dropout := step.pop("dropout", 0.0):
        raise ConfigError(f"step.dropout={dropout} is not planned: 0")
    step.pop("weight_dtype", None)  # the deployment's
    if lora := step.pop("lora", None):
        targets = lora["targets"]
        step["lora"] = planner.LoRA(
            **{**lora, "targets": tuple(targets) if isinstance(targets, list) else targets}
        )
    if "frozen" in step:
        step["frozen"] = tuple(step["frozen"])
    known = {field.name for field in fields(planner.Training)}
    if unknown := sorted(step.keys() - known):
        raise ConfigError(f"step.{unknown[0]} is not known: this planner has no such field")
    return planner.Training(batch=record.batch, sequence_tokens=record.prompt_tokens, **step)


def _row(record: Record, quantity: str, prediction: float | None, value: float) -> Row:
    return Row(
        device=record.environment.gpu or record.environment.device_name,
        suite=record.suite,
        split=record.split,
        model=record.model,
        phase=record.phase,
        quantity=quantity,
        predicted=prediction,
        measured=value,
        relative_error=relative_error(prediction, value),
        record=record.id,
    )


def _tell(on_problem: Callable[[str], None] | None, message: str) -> None:
    if on_problem is not None:
        on_problem(message)
