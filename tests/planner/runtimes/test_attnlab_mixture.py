"""What the planner says of attnlab's experts: which product runs, their bytes and their time."""

from dataclasses import replace

import pytest
import torch

import planner
from attnlab.mixture import choose_experts
from planner import ConfigError, Deployment, Inference, Routing, Training
from planner.activations import peak
from planner.dtypes import element_bytes
from planner.program import Dims, evaluate
from planner.runtimes.attnlab_mixture import chosen_experts
from planner.runtimes.attnlab_program import Pass, forward_program

MIXTRAL = planner.load_model("mixtral-8x7b")
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(("hidden", "width"), [(8, 8), (8, 4), (4, 8), (12, 8), (8, 6), (16, 7)])
def test_the_product_is_the_one_that_attnlab_chooses(hidden, width, dtype):
    layer = MIXTRAL.layers[0]
    moe = replace(layer.feed_forward, moe_intermediate_size=width)
    model = replace(MIXTRAL, hidden_size=hidden, layers=(replace(layer, feed_forward=moe),))
    assert chosen_experts(model, dtype) == choose_experts(None, model, TORCH[dtype])


def of_step(gpus=4, weight_dtype=None, **fields):
    deploy = Deployment(
        gpu="a100-80gb", gpus=gpus, runtime="attnlab", mode="graph", tensor_parallel=gpus,
        weight_dtype=weight_dtype,
    )  # fmt: skip
    work = Inference(**{"batch": 1, "prompt_tokens": 5, "output_tokens": 200} | fields)
    return planner.estimate(MIXTRAL, work, deploy)


def test_tokens_that_are_dealt_out_in_turn_read_two_of_eight_experts_each():
    what = Pass(
        kind="decode", attention="sdpa", dtype="bf16", kv_dtype="bf16", logits="last"
    )  # fmt: skip
    program = forward_program(MIXTRAL, what)

    def read(batch):
        dims = Dims(batch=batch, tokens=1, context=9, routing=Routing(distribution="balanced"))
        return sum(
            segment.count * evaluate(op.moved[0], dims)
            for segment in program.segments
            for op in segment.ops
            if op.name.startswith("experts ") and op.flops
        )

    experts = sum(p.count for p in MIXTRAL.parameters() if p.group == "experts")
    assert [4 * read(1), 2 * read(2), read(4), read(64)] == [experts * element_bytes("bf16")] * 4


def test_a_loop_holds_one_product_twice_for_a_moment():
    """Each expert's rows, and all of them behind one another."""
    dims = Dims(batch=1, tokens=512, context=512)
    grouped, loop = (
        peak(
            forward_program(
                MIXTRAL,
                Pass(
                    kind="prefill", attention="sdpa", dtype="bf16", kv_dtype="bf16",
                    logits="last", experts=experts,
                ),
            ),
            dims,
        ).live_bytes
        for experts in ("grouped", "loop")
    )  # fmt: skip
    assert 0 <= loop - grouped <= 2 * 512 * 2 * 14336 * 2


def test_int8_weights_hold_experts_too_and_halve_a_step():
    """gpt-fast quantises them (mixtral-moe/quantize.py), its router it does not."""
    plain, narrow = of_step(), of_step(weight_dtype="int8")
    assert 0.5 < narrow.memory.weights_bytes / plain.memory.weights_bytes < 0.52
    assert 0.6 < narrow.latency.tpot_s / plain.latency.tpot_s < 0.85


@pytest.mark.parametrize(
    ("gpus", "weight_dtype", "published_s"),
    [(4, None, 6.437e-3), (8, None, 4.389e-3), (2, "int8", 6.45e-3), (4, "int8", 4.611e-3)],
)
def test_a_step_of_mixtral_is_near_what_gpt_fast_published(gpus, weight_dtype, published_s):
    """mixtral-moe/README.md at 6ecad9b: A100s limited to 330 W, 5 + 200 tokens, nothing fitted."""
    latency = of_step(gpus, weight_dtype).latency
    each_s = (latency.ttft_s + 199 * latency.tpot_s) / 200
    assert each_s == pytest.approx(published_s, rel=0.21)


def test_training_of_what_has_no_program_is_refused_by_name():
    config = {"model_type": "phimoe", "num_hidden_layers": 1}
    deploy = Deployment(gpu="h200", runtime="attnlab", dtype="bf16")
    with pytest.raises(ConfigError, match="phimoe's experts whose router is sparsemixer"):
        planner.estimate(planner.read_config(config), Training(batch=1, sequence_tokens=9), deploy)


def test_a_training_step_of_mixtral_is_planned():
    deploy = Deployment(gpu="h200", runtime="attnlab", dtype="bf16")
    small = replace(MIXTRAL, layers=MIXTRAL.layers[:2])
    memory = planner.estimate(small, Training(batch=1, sequence_tokens=512), deploy).memory
    assert memory.gradients_bytes == 2 * small.parameter_count
