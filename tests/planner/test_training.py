"""Estimates of training: parts, refusals, times, the CLI."""

from __future__ import annotations

import json

import pytest

import planner
from planner import ConfigError
from planner.cli.commands import main
from planner.ledger import total_bytes
from planner.program import ADDED
from tests.planner.configs import TINY

LLAMA = planner.load_model("llama-3.1-8b")


def of(model=LLAMA, gpu="h200", runtime="attnlab", dtype=None, attention=None, **work):
    work = {"batch": 2, "sequence_tokens": 2048, **work}
    deploy = planner.Deployment(gpu=gpu, runtime=runtime, dtype=dtype, attention=attention)
    return planner.estimate(model, planner.Training(**work), deploy)


def test_adamw_holds_sixteen_bytes_a_parameter_in_fp32():
    """Weights, gradients and two moments of 4 bytes each (ZeRO, arXiv:1910.02054, §3.1)."""
    memory = of(dtype="fp32", attention="naive").memory
    states = memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes
    assert states == pytest.approx(16 * LLAMA.parameter_count, rel=1e-6)  # rotary frequencies


def test_the_parts_and_the_rows_sum_to_the_total():
    estimate = of()
    assert total_bytes(estimate.rows) == estimate.memory.total_bytes
    assert estimate.table()["bytes"].sum() == estimate.memory.total_bytes
    overhead = estimate.memory.overhead_bytes
    assert estimate.memory.peak_live_bytes == estimate.memory.total_bytes - overhead


def test_checkpointing_keeps_one_layers_inputs_and_a_layer_that_runs_again():
    """Chen et al., arXiv:1604.06174: what n layers keep becomes n inputs and the inside of one."""
    large = {"batch": 8, "sequence_tokens": 8192, "optimizer": None}
    held = of(**large).memory.activations_bytes
    again = of(**large, checkpointing="full").memory.activations_bytes
    inputs = 32 * 8 * 8192 * 4096 * 2
    logits = 8 * 8192 * LLAMA.vocab_size * (2 + 4 + 4 + 4)  # bf16, float32, logarithms, gradient
    assert inputs < again < inputs + held / 32 + logits
    assert again < held / 4


def test_no_optimizer_ends_after_the_backward():
    memory = of(optimizer=None).memory
    assert memory.optimizer_bytes == 0
    assert memory.total_bytes == of(optimizer="sgd").memory.total_bytes


def test_a_step_takes_six_flops_a_parameter_and_token():
    """Kaplan et al., arXiv:2001.08361, §2.1; attention's own products and the embedding aside."""
    estimate = of(batch=8, sequence_tokens=256, optimizer=None)
    products = LLAMA.parameter_count - LLAMA.vocab_size * LLAMA.hidden_size
    floor_s = 6 * products * 8 * 256 / estimate.gpu.flops_per_s("bf16")
    assert floor_s < estimate.latency.step_s < 2.5 * floor_s
    assert estimate.latency.trained_tokens_per_s == 8 * 256 / estimate.latency.step_s


def test_each_batch_of_a_step_takes_its_time():
    model, deploy = planner.load_model("llama-3.2-1b"), planner.Deployment(gpu="h200", mode="eager")
    one, two, four = (
        planner.estimate(
            model, planner.Training(batch=2, sequence_tokens=512, accumulation_steps=n), deploy
        ).latency
        for n in (1, 2, 4)
    )
    assert four.step_s - two.step_s == pytest.approx(2 * (two.step_s - one.step_s), rel=0.01)
    assert four.trained_tokens_per_s * four.step_s == pytest.approx(4 * 2 * 512)
    flops = [latency.mfu * latency.step_s for latency in (one, four)]
    assert flops[1] == pytest.approx(4 * flops[0], rel=0.01)  # the optimizer's are few


def test_gradients_of_later_batches_are_added_to_the_first_ones():
    """AccumulateGrad, accumulate_grad.h: variable_grad += new_grad, once a parameter; two tensors
    read and one written, 6 bytes of bf16.
    """
    model, deploy = planner.load_model("llama-3.2-1b"), planner.Deployment(gpu="h200", mode="eager")
    added = {}
    for batches in (1, 2):
        work = planner.Training(batch=2, sequence_tokens=512, accumulation_steps=batches)
        ops = planner.estimate(model, work, deploy).op_times()
        added[batches] = ops[ops.op.str.endswith(ADDED)]
    assert len(added[1]) == 0
    assert added[2]["count"].sum() == 2 + 16 * 9  # embedding (the head is tied), norm; a layer's
    assert (added[2]["count"] * added[2].moved_bytes).sum() == 6 * model.parameter_count


def test_the_longest_sequence_and_the_largest_batch_just_fit():
    deploy = planner.Deployment(gpu="h200", runtime="attnlab")
    work = planner.Training(batch=1, sequence_tokens=1024)
    longest, largest = (
        planner.max_context_tokens(LLAMA, work, deploy),
        planner.max_batch(LLAMA, work, deploy),
    )
    assert of(batch=1, sequence_tokens=longest).fits
    assert not of(batch=1, sequence_tokens=longest + 1).fits
    assert of(batch=largest, sequence_tokens=1024).fits
    assert not of(batch=largest + 1, sequence_tokens=1024).fits


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"runtime": "vllm"}, "runtime=vllm does not plan training yet: attnlab, transformers"),
        ({"method": "qlora"}, "method='qlora' is not planned for runtime=attnlab yet: full, lora"),
        (
            {"checkpointing": "selective", "keep_every": 2},
            "keep_every=2 is not planned for runtime",
        ),
        ({"checkpointing": "half"}, "checkpointing='half' is not allowed: one of none, full, sel"),
        ({"checkpoint_every": 2}, "checkpoint_every=2 is not allowed: 1 for checkpointing='none'"),
        (
            {"keep_every": 2},
            "keep_every=2 is not allowed: 1 for checkpointing='none', any for 'sel",
        ),
        ({"loss_chunk_tokens": 0}, "loss_chunk_tokens=0 is not allowed"),
        ({"precision": "autocast", "dtype": "fp16"}, "precision='autocast' in dtype='fp16' is not"),
        ({"optimizer": "lion"}, "optimizer='lion' is not allowed: one of adamw, sgd, sgd-mom"),
        ({"optimizer_impl": "apex"}, "optimizer_impl='apex' is not allowed"),
        ({"sequence_tokens": 131_073}, "sequence_tokens=131073 reaches beyond"),
        ({"batch": 0}, "batch=0 is not allowed"),
    ],
)
def test_what_is_not_planned_is_refused_in_one_line(given, said):
    with pytest.raises(ConfigError) as refused:
        of(**given)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("method", "weight_dtype"), [("full", "nf4"), ("lora", "int8")])
def test_training_of_quantised_weights_is_refused(method, weight_dtype):
    deploy = planner.Deployment(gpu="h200", weight_dtype=weight_dtype)
    work = planner.Training(batch=1, sequence_tokens=64, method=method)
    with pytest.raises(ConfigError, match="training of bitsandbytes weights is not planned yet"):
        planner.estimate(LLAMA, work, deploy)


def test_a_gpu_whose_attention_was_not_measured_is_marked():
    model = planner.read_config(TINY["llama"])
    seen = {gpu: of(model, gpu=gpu, dtype="bf16", sequence_tokens=64) for gpu in ("l40s", "h200")}
    assert "not measured" in seen["l40s"].peak_note
    assert seen["h200"].peak_note == of(model, gpu="cpu", sequence_tokens=64).peak_note == ""


def test_the_command_line_plans_a_step(capsys):
    arguments = ["estimate", "llama-3.1-8b", "--gpu", "h200", "--runtime", "attnlab", "--train"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--sequence", "2048", "--batch", "2", "--json"])
    assert ended.value.code == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["memory"]["total_bytes"] == of().memory.total_bytes
    assert answer["workload"]["optimizer"] == "adamw"
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--sequence", "131072", "--batch", "64", "--optimizer", "none"])
    assert ended.value.code == 1
    assert "Does not fit" in capsys.readouterr().out


def test_the_timeline_of_a_step_reaches_its_peak_in_the_same_layer():
    estimate = of(planner.read_config(TINY["llama"]), gpu="cpu", dtype="fp32", sequence_tokens=64)
    table = estimate.timeline()
    highest = table[table["peak"]].iloc[0]
    assert highest["live_bytes"] == estimate.memory.peak_live_bytes
    assert (highest["phase"], highest["op"]) == (estimate.peak_phase, estimate.peak.op)
    assert highest["layer"] == estimate.peak.layer == 2  # the last one goes back first
    assert list(table["phase"].unique()) == ["forward", "backward", "optimizer step"]
    assert len(estimate.moments()) == len(table)
