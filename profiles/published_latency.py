"""Latencies that others measured and published (data/published/), beside what is planned for them.

Nothing was fitted on them. What is compared is what a row prints, never a figure made from it, but
for one: TPOT of transformers is (generate − forward) / (output tokens − 1), from two that it
prints. Rates are of the whole time: batch · output tokens / (TTFT + steps), with the prompts' where
the source counts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import planner
from planner.errors import ConfigError
from planner.timing.latency import Latency
from profiles.published_causes import cause
from profiles.published_engines import engine_of, plan_of
from profiles.published_sources import address, read, repository
from profiles.rows import relative_error

EXPLAINED_FROM = 0.15
"""A larger error than this needs a sentence: what times others' kernels take, nobody here saw."""

PROMPTS_TOO = "prompt and output"
"""`tokens_per_s_of` a record whose rate counts prompts; without that field, output tokens alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyRow:
    """One quantity of one published run, in seconds or tokens/s.

    `predicted` None: not expressed, for the reason `why`. `planned_as`: the runtime it is planned
    as, `bound_by` what binds the plan.
    """

    row: int
    source: str
    url: str
    licence: str
    engine: str
    model: str
    gpu: str
    run: str
    quantity: str
    measured: float
    predicted: float | None = None
    relative_error: float | None = None
    planned_as: str = ""
    bound_by: str = ""
    why: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencySummary:
    """Errors of one quantity of one engine; `mean_error` has its sign."""

    engine: str
    quantity: str
    n: int
    unpredicted: int
    mean_error: float | None
    mean_abs_error: float | None
    worst_abs_error: float | None


def load() -> list[dict[str, Any]]:
    """The published rows as they were collected."""
    return read("latency.jsonl")


def latency_rows() -> list[LatencyRow]:
    """Every published quantity, planned where it can be."""
    return [row for index, record in enumerate(load()) for row in rows_of(index, record)]


def rows_of(index: int, record: dict[str, Any]) -> Iterator[LatencyRow]:
    """The rows of one published run."""
    about: dict[str, Any] = {
        "row": index,
        "source": repository(record),
        "url": address(record),
        "licence": record["licence"],
        "engine": engine_of(record),
        "model": record["model"],
        "gpu": record["gpu"] if record["gpus"] == 1 else f"{record['gpus']} × {record['gpu']}",
        "run": in_words(record),
    }
    printed = published(record)
    try:
        plan = plan_of(record)
        latency = planner.estimate(plan.model, plan.work, plan.deploy).latency
    except ConfigError as refused:
        for quantity, value in printed.items():
            yield LatencyRow(**about, quantity=quantity, measured=value, why=str(refused))
        return
    for quantity, value in printed.items():
        predicted = figure(record, latency, quantity)
        error = relative_error(predicted, value)
        assert error is not None
        first = quantity == "ttft_s" or latency.step_s is not None
        bound = latency.prefill_bound_by if first else latency.decode_bound_by
        missed = abs(error) > EXPLAINED_FROM
        yield LatencyRow(
            **about,
            quantity=quantity,
            measured=value,
            predicted=predicted,
            relative_error=error,
            planned_as=plan.planned_as,
            bound_by=bound,
            why=cause(record, quantity, error, bound) if missed else "",
        )


def published(record: dict[str, Any]) -> dict[str, float]:
    """What a record prints, by quantity."""
    found: dict[str, float] = {}
    if "ttft_ms" in record:
        found["ttft_s"] = record["ttft_ms"] / 1e3
    if "e2e_ms" in record and "ttft_ms" in record:
        found["tpot_s"] = (record["e2e_ms"] - record["ttft_ms"]) / 1e3 / (record["output"] - 1)
    elif "e2e_ms" in record:
        found["end_to_end_s"] = record["e2e_ms"] / 1e3
    if "tokens_per_s" in record:
        found["tokens_per_s"] = record["tokens_per_s"]
    return found


def figure(record: dict[str, Any], latency: Latency, quantity: str) -> float:
    """The same of the plan."""
    if quantity == "tokens_per_s" and latency.trained_tokens_per_s is not None:
        return latency.trained_tokens_per_s
    if quantity == "tokens_per_s":
        assert latency.end_to_end_s is not None
        prompts = record.get("tokens_per_s_of") == PROMPTS_TOO
        tokens = record["output"] + (record["prompt"] if prompts else 0)
        return float(record["batch"] * tokens / latency.end_to_end_s)
    value = getattr(latency, quantity)
    assert value is not None
    return float(value)


def in_words(record: dict[str, Any]) -> str:
    """What was run, in a few words."""
    parts = [record["dtype"], record.get("attention", "")]
    size = f"{record['batch']} × ({record['prompt']} + {record['output']})"
    if record["kind"] == "training_step":
        size = f"a training step of {record['batch']} × {record['prompt']}"
    return ", ".join(filter(None, (*parts, size)))


def latency_summary(rows: Iterable[LatencyRow]) -> list[LatencySummary]:
    """By engine and quantity, in the order of the rows."""
    groups: dict[tuple[str, str], list[LatencyRow]] = {}
    for row in rows:
        groups.setdefault((row.engine, row.quantity), []).append(row)
    return [_summarise(*key, group) for key, group in groups.items()]


def _summarise(engine: str, quantity: str, group: list[LatencyRow]) -> LatencySummary:
    errors = [row.relative_error for row in group if row.relative_error is not None]
    sizes = [abs(error) for error in errors]
    return LatencySummary(
        engine=engine,
        quantity=quantity,
        n=len(errors),
        unpredicted=len(group) - len(errors),
        mean_error=fmean(errors) if errors else None,
        mean_abs_error=fmean(sizes) if sizes else None,
        worst_abs_error=max(sizes, default=None),
    )
