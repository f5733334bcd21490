"""Replayed decode steps: what a CPU can tell of them, a stand-in for the graph alone."""

from dataclasses import dataclass, replace

import pytest
import torch

import planner
from planner import ConfigError
from profiles import graph_step
from profiles.bench import Bench
from profiles.compare import compare, measured
from profiles.environment import describe
from profiles.measurement import record_of
from profiles.points import Point, SuitePoint
from profiles.suite_run import run_points
from profiles.workloads import build

CPU = torch.device("cpu")
POINT = Point(
    phase="decode",
    batch=2,
    prompt_tokens=8,
    output_tokens=4,
    repeats=5,
    warmup=1,
    mode="graph",
)


@dataclass
class Replayed:
    """Runs at once what a graph would run when it is replayed, and counts the replays."""

    token: torch.Tensor
    count: list[int]

    def replay(self):
        self.count.append(1)


@pytest.fixture
def llama():
    return planner.load_model("llama-50m")


@pytest.fixture
def workload(llama):
    return build(llama, runtime="attnlab", attention=None, dtype="bf16", device=CPU)


def seen(workload, monkeypatch):
    replays, fed = [], []

    def capture(workload, ids, logits):
        fed.append(ids.clone())
        with torch.no_grad():
            token = workload.forward(ids, logits)[:, -1:].argmax(-1)
        return Replayed(token, replays)

    monkeypatch.setattr(graph_step, "capture", capture)
    found = Bench(CPU, None, None).time(workload, POINT)
    return found, replays, fed


def test_every_decode_step_of_every_pass_is_timed_and_nothing_else(workload, monkeypatch):
    found, replays, fed = seen(workload, monkeypatch)
    passes, steps = 2, 3  # five steps were asked for, a pass has three
    assert len(found["step_s"]) == passes * steps
    assert found["ttft_s"] == ()
    assert len(replays) == 2 * passes * steps, "once to upload, once on the clock"
    assert len(fed) == passes * steps


def test_a_step_is_given_the_token_of_the_step_before(workload, monkeypatch):
    _, _, fed = seen(workload, monkeypatch)
    workload.reset()
    from profiles.bench import random_ids

    ids = random_ids(workload.vocab_size, POINT.batch, POINT.prompt_tokens)
    eager = list(workload.tokens(ids, output_tokens=POINT.output_tokens, logits="last"))
    for given, expected in zip(fed[: len(eager) - 1], eager, strict=False):
        assert torch.equal(given, expected)


def test_a_record_of_replayed_steps_is_held_against_a_decode_step_without_its_host(
    llama, workload, monkeypatch
):
    found, _, _ = seen(workload, monkeypatch)
    record = record_of(
        llama,
        POINT,
        runtime="attnlab",
        attention="sdpa",
        dtype="bf16",
        status="ok",
        seen=found,
        env=replace(describe(CPU, None), gpu="h200"),
    )
    assert record.mode == "graph"
    assert set(measured(record)) == {"replay_s"}
    (row,) = compare([record])
    work = planner.Inference(batch=2, prompt_tokens=8, output_tokens=4)
    how = {"runtime": "attnlab", "attention": "sdpa", "dtype": "bf16"}
    deploy = planner.Deployment(gpu="h200", mode="captured", **how)
    replayed = planner.estimate(llama, work, deploy).latency.tpot_s
    eager = planner.estimate(llama, work, replace(deploy, mode="eager")).latency.tpot_s
    assert row.predicted == pytest.approx(replayed)
    assert replayed < eager


def test_only_a_decode_is_replayed():
    with pytest.raises(ConfigError, match="phase"):
        Point(phase="prefill", batch=1, prompt_tokens=8, mode="graph")


def test_a_graph_off_a_gpu_is_refused_in_one_line(workload):
    with pytest.raises(ConfigError, match="mode=graph is not measured on device=cpu: cuda"):
        graph_step.capture(workload, torch.zeros(1, 1, dtype=torch.int64), "last")


def test_a_suite_on_a_cpu_leaves_replayed_points_out(tmp_path):
    point = SuitePoint(model="llama-50m", run=POINT, split="held-out", runtime="attnlab")
    run = run_points("test", [point], device="cpu", out=tmp_path / "records.jsonl")
    assert run.records == ()
    (reason,) = run.skipped
    assert reason.endswith("a CUDA graph needs a GPU")
