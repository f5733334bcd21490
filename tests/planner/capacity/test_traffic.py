"""Requests of different lengths, and how many of them run at once."""

import math
import random

import pytest

import planner
from planner import ConfigError
from planner.capacity import traffic
from planner.capacity.concurrency import concurrent_requests

LLAMA = planner.load_model("llama-3.1-8b")
VLLM = planner.Deployment(gpu="rtx-4090", runtime="vllm")


def test_a_lognormal_has_the_mean_that_it_is_given():
    made = traffic.lognormal(prompt_mean=1000, prompt_sigma=0.7, output_mean=200, output_sigma=0.5)
    prompt, output = made.mean
    assert prompt == pytest.approx(1000, rel=0.02)
    assert output == pytest.approx(200, rel=0.02)


def test_requests_that_an_engine_refuses_are_left_out():
    made = traffic.lognormal(
        prompt_mean=1000, prompt_sigma=1, output_mean=200, output_sigma=1, longest_tokens=4096
    )
    assert max(p + o for p, o, _ in made.requests) <= 4096


@pytest.mark.parametrize(
    "header", ["prompt_tokens,output_tokens", "TIMESTAMP,ContextTokens,GeneratedTokens"]
)
def test_a_trace_is_read_with_the_columns_that_traces_have(tmp_path, header):
    lead = "2023-11-16," if header.startswith("TIME") else ""
    path = tmp_path / "trace.csv"
    path.write_text(f"{header}\n{lead}100,20\n{lead}100,20\n{lead}7,3\n{lead}5,0\n")
    made = traffic.trace(path)
    assert made.requests == ((100, 20, 2.0), (7, 3, 1.0))
    assert made.in_words == "3 requests of trace.csv"
    assert made.longest == (100, 20)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "has no column prompt_tokens"),
        ("prompt_tokens,output_tokens\n", "has no requests"),
        ("prompt_tokens,output_tokens\n1,x\n", "output_tokens='x' in line 2"),
        ("prompt_tokens,output_tokens\n1\n", "output_tokens=None in line 2"),
        ("prompt_tokens,output_tokens\n1.5,2\n", "prompt_tokens='1.5' in line 2"),
        ("", "has no column"),
    ],
)
def test_a_bad_trace_is_one_line(tmp_path, text, said):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        traffic.trace(path)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", None])
def test_a_file_that_is_no_csv_is_one_line(tmp_path, content):
    path = tmp_path / "trace.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be read as CSV"):
        traffic.trace(path)


def test_equal_requests_without_growth_fill_the_pool_exactly():
    """With one output token a request holds its prompt's blocks and nothing else."""
    work = planner.Inference(batch=1, prompt_tokens=1000, logits="last")
    e = planner.estimate(LLAMA, work, VLLM)
    found = concurrent_requests(LLAMA, traffic.fixed(1000, 1), VLLM)
    assert found.requests == found.worst_case == e.kv_pool_bytes // e.memory.kv_cache_bytes
    assert found.deviation_bytes == pytest.approx(0, abs=found.mean_bytes * 1e-6)


def test_a_simulation_of_running_requests_agrees():
    """Draw who runs at a moment: overflows of the pool are as rare as asked for."""
    made = traffic.lognormal(
        prompt_mean=900, prompt_sigma=0.9, output_mean=400, output_sigma=0.7, longest_tokens=9000
    )
    found = concurrent_requests(LLAMA, made, VLLM, probability=0.95)
    pool = planner.estimate(LLAMA, planner.Inference(batch=1, prompt_tokens=8), VLLM).kv_pool_bytes
    draw = random.Random(0)
    kinds = [(p, o) for p, o, _ in made.requests]
    lives = [o * n for _, o, n in made.requests]

    def held(n):
        blocks = 0
        for prompt, output in draw.choices(kinds, lives, k=n):
            blocks += math.ceil((prompt + draw.randrange(output)) / 16)
        return blocks * 16 * 2 * 8 * 128 * 2 * 32

    def overflows(n):
        return sum(held(n) > pool for _ in range(1500)) / 1500

    assert overflows(found.requests) < 0.08
    assert overflows(math.ceil(1.15 * found.requests)) > 0.05
    assert found.worst_case < found.requests


def test_an_engine_runs_no_more_sequences_than_it_is_set_to():
    deploy = planner.Deployment(gpu="h200", runtime="vllm", max_sequences=8)
    found = concurrent_requests(LLAMA, traffic.fixed(100, 100), deploy)
    assert (found.requests, found.binding) == (8, "max_sequences")
    answer = planner.most_requests(LLAMA, traffic.fixed(100, 100), deploy)
    assert answer.value == planner.max_concurrent_requests(LLAMA, traffic.fixed(100, 100), deploy)


def test_a_runtime_without_a_pool_runs_a_batch_padded_to_the_longest():
    deploy = planner.Deployment(gpu="rtx-4090", runtime="attnlab")
    made = traffic.Traffic(requests=((100, 500, 9.0), (2000, 10, 1.0)), in_words="two kinds")
    work = planner.Inference(batch=1, prompt_tokens=2000, output_tokens=500, logits="last")
    assert planner.max_concurrent_requests(LLAMA, made, deploy) == planner.max_batch(
        LLAMA, work, deploy
    )


def test_requests_beyond_the_model_are_refused():
    with pytest.raises(ConfigError, match="of the longest request reaches beyond 131072"):
        planner.max_concurrent_requests(LLAMA, traffic.fixed(131_072, 2), VLLM)
    with pytest.raises(ConfigError, match=r"probability=1\.0 is not allowed"):
        planner.max_concurrent_requests(LLAMA, traffic.fixed(1, 2), VLLM, probability=1.0)
