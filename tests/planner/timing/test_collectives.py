"""Sharded steps: collectives by the tables, and how much of them kernels hide."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import planner
from planner.catalog.gpus import gpu_named
from planner.program import Dims
from planner.runtimes import runtime_named
from planner.timing.calibration import load
from planner.timing.clock import speed_of
from planner.timing.collectives import Lanes, Turn, collective_seconds
from planner.timing.passes import passes_of
from planner.timing.roofline import Cost

MODEL = planner.load_model("llama-3.1-8b")
STEP = planner.Training(
    batch=2, sequence_tokens=8192, checkpointing="selective", keep_every=2
)  # torchtitan's
DEPLOY = planner.Deployment(
    gpu="h100-96gb-hbm2e",
    dtype="bf16",
    weight_dtype="fp32",
    data_parallel_shards=8,
    reshard_after_forward="all-but-last",
    power_limit_w=500,
)


def step_s(work=STEP, **settings):
    return planner.estimate(MODEL, work, replace(DEPLOY, **settings)).latency.step_s


@pytest.mark.parametrize(
    ("kind", "elements", "ms"),
    [("all_gather", 2**28, 1.395), ("all_gather", 2**24, 0.1234), ("reduce_scatter", 2**28, 1.393)],
)
def test_collectives_take_what_the_table_of_nccl_says(kind, elements, ms):
    """aiconfigurator-core 0.12, h200_sxm, nccl 2.29.2, half, 8 GPUs."""
    seconds, _ = collective_seconds(kind, 2 * elements, 8, speed_of(gpu_named("h200"), "bf16"))
    assert 1e3 * seconds == pytest.approx(ms, rel=0.05)


def test_every_gpu_of_the_tables_has_gathers_and_reductions():
    for gpu in ("a100-80gb", "h100-80gb", "h200", "l40s", "b200", "b300", "gb200", "gb300"):
        assert {"all_gather:4", "reduce_scatter:4"} <= load(gpu).fits.keys()


def turns(*, gather=0.0, kernels=1.0, reduce=0.0, layers=4):
    """A root without kernels of its own, then equal layers."""
    cost = Cost(flops=0.0, moved_bytes=0.0, time_s=kernels)
    layer = Turn(gather_s=gather, cost=cost, reduce_s=reduce)
    return layer, layers


def test_kernels_hide_all_but_the_first_gather_and_the_last_reduction():
    forward = Lanes(turns=(turns(gather=0.25),), backward=False)
    assert forward.seconds(1.0) == pytest.approx(0.25 + 4)
    backward = Lanes(turns=(turns(gather=0.25, reduce=0.5),), backward=True)
    assert backward.seconds(1.0) == pytest.approx(4 + 0.5)


def test_collectives_that_outlast_kernels_set_the_pace():
    forward = Lanes(turns=(turns(gather=3.0),), backward=False)
    assert forward.seconds(1.0) == pytest.approx(4 * 3.0 + 1.0)
    backward = Lanes(turns=(turns(gather=1.0, reduce=2.0),), backward=True)
    assert backward.seconds(1.0) >= 4 * 3.0 - 1.0


def test_a_step_lies_between_its_kernels_and_everything_in_turn():
    table = planner.estimate(MODEL, STEP, DEPLOY).op_times()
    said = table[table.family == "communication"].total_s.sum()
    kernels = table[table.family != "communication"].total_s.sum()
    assert kernels < step_s() < kernels + said
    gathered = table[table.op == "all_gather"]
    layers = 2 * sum(p.count for p in MODEL.parameters() if p.layer is not None)
    twice = (gathered.moved_bytes * gathered["count"]).sum()
    assert twice == pytest.approx(2 * layers + 2 * 2 * 128_256 * 4096, rel=0.02)


def test_a_published_step_of_eight_gpus_is_met():
    """torchtitan, llama3_h100_202412: 5 762 tokens/s a GPU, uncompiled; nothing is fitted."""
    assert step_s() == pytest.approx(2 * 8192 / 5762, rel=0.10)


def test_a_lower_power_limit_stretches_what_computes():
    assert step_s(power_limit_w=None) < step_s() < 1.4 * step_s(power_limit_w=None)
    decode = planner.Inference(batch=1, prompt_tokens=16, output_tokens=2)
    limits = [
        planner.estimate(MODEL, decode, planner.Deployment(gpu="h200", power_limit_w=w)).latency
        for w in (None, 500)
    ]
    assert limits[0].tpot_s == limits[1].tpot_s  # streams weights, and draws less


def test_logits_of_a_divided_vocabulary_are_gathered_by_vllm():
    """256 sequences: 65.7 MB among 8 GPUs, 0.21 ms by the table; sums of 4 MB for each layer."""
    work = planner.Inference(batch=256, prompt_tokens=16, output_tokens=2)
    taken = []
    for vocab_size in (MODEL.vocab_size, 1024):
        model = planner.read_config({**MODEL.config, "vocab_size": vocab_size})
        deploy = planner.Deployment(gpu="h200", runtime="vllm", tensor_parallel=8)
        e = planner.estimate(model, work, deploy)
        passes = passes_of(e.model, e.setting, "vllm", e.gpu)
        rules = runtime_named("vllm")
        made = passes.timed(
            lambda stage, e=e, rules=rules: rules.decode(stage, work, e.setting),
            Dims(batch=256, tokens=1, context=17),
        )
        taken.append(float(made.communication_s))
    assert taken[0] - taken[1] == pytest.approx(0.21e-3, rel=0.15)


@pytest.mark.parametrize("gpu", ["h200", "a100-80gb"])  # with joules of its own, and without
def test_a_gpu_draws_no_more_than_it_is_held_to(gpu):
    work = planner.Inference(batch=8, prompt_tokens=8192, output_tokens=1)
    limited = planner.Deployment(gpu=gpu, runtime="vllm", power_limit_w=200)
    took = planner.estimate(MODEL, work, limited).latency
    assert took.energy_j <= 200 * took.end_to_end_s * (1 + 1e-9)


@pytest.mark.parametrize("watts", [0, -1, 1e9, "500", True, np.nan])
def test_a_power_limit_no_gpu_has_is_refused(watts):
    with pytest.raises(planner.ConfigError, match=r"power_limit_w=.* is not allowed: watts"):
        planner.Deployment(gpu="h200", power_limit_w=watts)
