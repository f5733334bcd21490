"""The whole loop on this machine's CPU: time its ops, fit them, predict models, run those.

    python benchmarks/cpu_calibration.py [--model llama-50m]

Ops are timed first; nothing of a model is fitted. attnlab's passes follow (prefill, decode,
a training step), of sizes that no op was timed at; each is run twice, so that how far two runs of
one thing are apart stands beside how far the prediction is off.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

import planner
from planner.timing import clock
from planner.timing.calibration import from_dict
from profiles.bench import random_ids
from profiles.calibrate import calibration
from profiles.microbench.op_record import load
from profiles.microbench.run import run
from profiles.training_bench import TrainingRun
from profiles.workloads import build

BUDGET_S = 120.0
SIZES = ((1, 96), (1, 300), (3, 160), (2, 400))
"""Batch × prompt tokens."""
OUTPUT_TOKENS = 9
REPEATS = 5
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What is run, what is predicted of it, and the medians of two runs."""

    name: str
    predicted_s: float
    measured_s: tuple[float, float]

    @property
    def error(self) -> float:
        """Of the mean of both runs."""
        return self.predicted_s / statistics.fmean(self.measured_s) - 1.0

    @property
    def apart(self) -> float:
        """How far the runs are apart, as a share of their mean."""
        first, second = self.measured_s
        return abs(first - second) / statistics.fmean(self.measured_s)


def main() -> None:
    """Print a line for each pass, and the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-50m")
    model = planner.load_model(parser.parse_args().model)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cpu.jsonl"
        started = time.perf_counter()
        run("cpu", budget_s=BUDGET_S, out=out)
        known = from_dict(calibration("cpu", records=load(out)))
    print(f"{time.perf_counter() - started:.0f} s to time and fit this CPU's ops")
    clock.calibration_of = lambda gpu: known  # type: ignore[assignment]
    passes = []
    for one in [*inference(model), *training(model)]:
        passes.append(one)
        seconds = " ".join(f"{1e3 * s:8.1f}" for s in one.measured_s)
        print(
            f"{one.name:<34}{1e3 * one.predicted_s:8.1f} ms, measured {seconds} ms"
            f"{one.error:+9.1%}{one.apart:8.1%} apart"
        )
    print(
        f"mean |error| {statistics.fmean(abs(p.error) for p in passes):.1%} of {len(passes)}; "
        f"two runs are apart by {statistics.fmean(p.apart for p in passes):.1%}"
    )


def inference(model: planner.Model) -> Iterator[Pass]:
    """Prefills, and decode steps after them."""
    workload = build(model, runtime="attnlab", attention=None, dtype="fp32", device=CPU)
    for batch, prompt in SIZES:
        work = planner.Inference(
            batch=batch, prompt_tokens=prompt, output_tokens=OUTPUT_TOKENS, logits="last"
        )
        latency = planner.estimate(model, work, deployment()).latency
        ids = random_ids(model.vocab_size, batch, prompt)

        def tokens(ids: torch.Tensor = ids) -> list[float]:
            workload.reset()
            times = [time.perf_counter()]
            for _ in workload.tokens(ids, output_tokens=OUTPUT_TOKENS, logits="last"):
                times.append(time.perf_counter())
            return [b - a for a, b in pairwise(times)]

        workload.begin(batch=batch, capacity_tokens=prompt + OUTPUT_TOKENS)
        both = [timed(tokens) for _ in range(2)]
        for name, predicted_s, pick in (
            ("prefill", latency.ttft_s, slice(0, 1)),
            ("decode", latency.tpot_s, slice(1, None)),
        ):
            assert predicted_s is not None
            first, second = (statistics.median(t for row in rows for t in row[pick])
                             for rows in both)  # fmt: skip
            yield Pass(
                name=f"{name} {batch} × {prompt}",
                predicted_s=predicted_s,
                measured_s=(first, second),
            )


def training(model: planner.Model) -> Iterator[Pass]:
    """Steps of AdamW, with and without checkpointing."""
    for batch, tokens, checkpointing in ((1, 96, "none"), (2, 160, "none"), (2, 160, "full")):
        work = planner.Training(
            batch=batch, sequence_tokens=tokens, optimizer="adamw", checkpointing=checkpointing
        )
        predicted_s = planner.estimate(model, work, deployment()).latency.step_s
        assert predicted_s is not None
        workload = build(model, runtime="attnlab", attention=None, dtype="fp32", device=CPU)
        steps = TrainingRun(workload, work, random_ids(model.vocab_size, batch, tokens))

        def step(steps: TrainingRun = steps) -> list[float]:
            started = time.perf_counter()
            steps.step()
            return [time.perf_counter() - started]

        step()
        first, second = (
            statistics.median(row[0] for row in rows) for rows in (timed(step), timed(step))
        )
        yield Pass(
            name=f"training {batch} × {tokens}, {checkpointing}",
            predicted_s=predicted_s,
            measured_s=(first, second),
        )


def timed(one: Callable[[], list[float]]) -> list[list[float]]:
    """Some repeats after one that is not timed."""
    one()
    return [one() for _ in range(REPEATS)]


def deployment() -> planner.Deployment:
    """attnlab on this CPU, in fp32."""
    return planner.Deployment(gpu="cpu", runtime="attnlab", dtype="fp32", mode="eager")


if __name__ == "__main__":
    main()
