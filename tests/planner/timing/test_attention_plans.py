"""What is waited for at a new length, against steps that met theirs for the first time."""

from statistics import median

import pytest

import planner
from profiles import records
from profiles.compare import estimate_of

ALONE = [r for r in records.load([records.DATA / "h200.jsonl"])[0] if r.new_tpot_s is not None]


def of(name, prompt_tokens=512, **deploy):
    work = planner.Inference(batch=4, prompt_tokens=prompt_tokens, output_tokens=16)
    return planner.estimate(planner.load_model(name), work, planner.Deployment(**deploy))


def waits(record):
    """Measured and planned, at the speed that the host had."""
    planned = estimate_of(record, quantity="new_tpot_s").latency
    usual_s = (
        record.median_tpot_s
        * planned.tpot_s
        / estimate_of(record, quantity="tpot_s").latency.tpot_s
    )
    return record.new_tpot_s - usual_s, planned.new_length_s


def test_where_cudnn_attends_a_new_length_takes_tens_of_milliseconds_of_an_h200s_host():
    by_cudnn = [r for r in ALONE if r.attention == "sdpa:cudnn" and r.runtime == "transformers"]
    behind_masks = ("mistral-7b-v0.1 transformers generation 1 × 8192 + 8",)
    found = [waits(r) for r in by_cudnn if r.point not in behind_masks]
    assert len(found) > 15
    assert 0.7 < median(planned / measured for measured, planned in found) < 1.1
    assert min(measured for measured, _ in found) > 0.015


def test_other_kernels_plan_nothing():
    others = [r for r in ALONE if "cudnn" not in r.attention]
    assert len(others) > 3
    for record in others:
        measured, planned = waits(record)
        assert planned == 0.0
        assert measured < 0.1 * record.median_tpot_s


@pytest.mark.parametrize(
    "deploy",
    [
        {"gpu": "h200", "mode": "graph", "runtime": "attnlab"},
        {"gpu": "h200", "runtime": "vllm"},
        {"gpu": "h200", "attention": "eager"},
        {"gpu": "a100-80gb"},
        {"gpu": "h200", "dtype": "fp32"},
        {"gpu": "h200", "cache": planner.CacheSpec(kind="static")},
    ],
    ids=str,
)
def test_graphs_engines_flash_and_masks_plan_nothing(deploy):
    assert of("llama-3.1-8b", **{"mode": "eager"} | deploy).latency.new_length_s == 0.0


def test_a_faster_host_plans_faster():
    slow, fast = (
        of("llama-3.1-8b", gpu="h200", mode="eager", host_add_s=s).latency.new_length_s
        for s in (10e-6, 5e-6)
    )
    assert slow == pytest.approx(2 * fast)


@pytest.mark.parametrize("gpu", ["b200", "mi300x"])
def test_what_nobody_timed_is_not_said(gpu):
    assert of("llama-3.1-8b", gpu=gpu, mode="eager").latency.new_length_s is None


def test_a_window_plans_until_its_mask_begins():
    """Mistral's, of 4 096 tokens, in attnlab: a table hides what is before; cuDNN takes none."""
    within, beyond = (
        of("mistral-7b-v0.1", gpu="h200", mode="eager", runtime="attnlab", prompt_tokens=tokens)
        for tokens in (512, 8192)
    )
    assert within.latency.new_length_s > 0.01
    assert beyond.latency.new_length_s == 0.0
