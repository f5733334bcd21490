"""Pages that Linux gives a pass anew, counted, beside what planner/timing/fresh_pages.py expects.

    python benchmarks/page_faults.py

attnlab on a CPU in fp32: prefills of llama-50m and GPT-2 and a training step, each in a process of
its own after others like it. Faults are the process's own (getrusage), of one pass in the mean.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable
from functools import partial

import torch

import planner
from planner.program import Dims, Program
from planner.runtimes import runtime_named
from planner.timing.fresh_pages import fresh_bytes
from planner.training import training_phase
from profiles.bench import random_ids
from profiles.training_bench import TrainingRun
from profiles.workloads import build

BEFORE, COUNTED = 3, 5
CPU = torch.device("cpu")
DEPLOY = planner.Deployment(gpu="cpu", runtime="attnlab", dtype="fp32", attention="sdpa")
Case = tuple[str, Program, Dims, Callable[[], object]]


def main() -> None:
    """A line for each pass."""
    spawn = multiprocessing.get_context("spawn")
    for index in range(len(CASES)):
        process = spawn.Process(target=one, args=(index,))
        process.start()
        process.join()


def one(index: int) -> None:
    """One of them, here."""
    page = resource.getpagesize()
    name, program, dims, run = CASES[index]()
    for _ in range(BEFORE):
        run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(COUNTED):
        run()
    seen = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / COUNTED
    expected = float(fresh_bytes(program, dims)) / page
    print(f"{name:<40}{seen:12,.0f} faults {expected:12,.0f} expected {seen / expected:8.2f}")


def training() -> Case:
    """A step of AdamW."""
    work = planner.Training(batch=2, sequence_tokens=160)
    model = planner.load_model("llama-50m")
    estimate = planner.estimate(model, work, DEPLOY)
    phase = training_phase(estimate.model, work, DEPLOY, estimate.setting)
    workload = build(model, runtime="attnlab", attention=None, dtype="fp32", device=CPU)
    steps = TrainingRun(workload, work, random_ids(model.vocab_size, 2, 160))
    return "llama-50m, training 2 x 160", phase.program, phase.dims, steps.step


def prefill(named: str, batch: int, tokens: int) -> Case:
    """A prompt over a cache that is there."""
    model = planner.load_model(named)
    work = planner.Inference(batch=batch, prompt_tokens=tokens, logits="last")
    setting = planner.estimate(model, work, DEPLOY).setting
    program = runtime_named("attnlab").prefill(model, work, setting)
    workload = build(model, runtime="attnlab", attention=None, dtype="fp32", device=CPU)
    workload.begin(batch=batch, capacity_tokens=tokens + 1)
    ids = random_ids(model.vocab_size, batch, tokens)

    def run() -> None:
        workload.reset()
        next(iter(workload.tokens(ids, output_tokens=1, logits="last")))

    name = f"{model.name}, prefill {batch} x {tokens}"
    return name, program, Dims(batch=batch, tokens=tokens, context=tokens), run


CASES: tuple[Callable[[], Case], ...] = (
    partial(prefill, "llama-50m", 1, 512),
    partial(prefill, "llama-50m", 4, 256),
    partial(prefill, "llama-50m", 2, 448),
    partial(prefill, "gpt2", 2, 288),
    training,
)


if __name__ == "__main__":
    main()
