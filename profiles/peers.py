"""What other tools predict for Llama-3.1-8B on an H200: data/peers/, printed by those tools.

They speak of serving engines and ideal kernels. Beside them stands what we say of vLLM with CUDA
graphs at the same sizes, and what was measured there, of whichever runtime.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import planner
from profiles.records import Record

MODEL, GPU, DTYPE = "llama-3.1-8b", "h200", "bf16"
RUNTIME = "vllm"
STEPS = 8
"""Decode steps over which our TPOT is the mean: at the prompt's length, as the peers'."""
TABLE = Path(__file__).parent / "data" / "peers" / f"{MODEL}-{GPU}.csv"


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerRow:
    """One size: what each peer says, what we say of vLLM, what was measured, by runtime."""

    batch: int
    prompt_tokens: int
    quantity: str
    planner_s: float
    peers_s: Mapping[str, float] = field(hash=False)
    measured_s: Mapping[str, float] = field(hash=False)


@cache
def figures_s() -> dict[tuple[int, int, str], dict[str, float]]:
    """By (batch, prompt tokens, quantity): each peer's seconds."""
    found: dict[tuple[int, int, str], dict[str, float]] = {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            for quantity in ("ttft", "tpot"):
                key = (int(line["batch"]), int(line["prompt_tokens"]), f"{quantity}_s")
                found.setdefault(key, {})[line["peer"]] = float(line[f"{quantity}_ms"]) / 1e3
    return found


def peer_rows(records: Iterable[Record]) -> list[PeerRow]:
    """All sizes that the peers were asked for: TTFT of each, then TPOT."""
    asked = (MODEL, GPU, DTYPE)
    seen = [r for r in records if r.is_plain and (r.model, r.environment.gpu, r.dtype) == asked]
    rows = [
        PeerRow(
            batch=batch,
            prompt_tokens=prompt,
            quantity=quantity,
            planner_s=_ours_s(batch, prompt)[quantity],
            peers_s=theirs,
            measured_s=_measured_s(seen, batch, prompt, quantity),
        )
        for (batch, prompt, quantity), theirs in figures_s().items()
    ]
    return sorted(rows, key=lambda row: (row.quantity != "ttft_s", row.batch, row.prompt_tokens))


@cache
def _ours_s(batch: int, prompt_tokens: int) -> dict[str, float]:
    work = planner.Inference(
        batch=batch, prompt_tokens=prompt_tokens, output_tokens=STEPS + 1, logits="last"
    )
    deploy = planner.Deployment(gpu=GPU, runtime=RUNTIME, dtype=DTYPE, mode="graph")
    latency = planner.estimate(planner.load_model(MODEL), work, deploy).latency
    assert latency.ttft_s is not None
    assert latency.tpot_s is not None
    return {"ttft_s": latency.ttft_s, "tpot_s": latency.tpot_s}


def _measured_s(
    records: list[Record], batch: int, prompt_tokens: int, quantity: str
) -> dict[str, float]:
    """The median of each runtime's records of this size, and how its steps were launched."""
    found: dict[str, list[float]] = {}
    for record in records:
        if (record.batch, record.prompt_tokens) == (batch, prompt_tokens):
            tpot_s = record.median_step_s if record.mode == "graph" else record.median_tpot_s
            value = record.median_ttft_s if quantity == "ttft_s" else tpot_s
            if value is not None and record.step is None:
                found.setdefault(f"{record.runtime}, {record.mode}", []).append(value)
    return {name: statistics.median(values) for name, values in found.items()}
