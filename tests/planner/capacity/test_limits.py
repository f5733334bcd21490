from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import Deployment, Inference
from tests.properties import examples


@pytest.mark.parametrize("runtime", ["transformers", "attnlab", "vllm"])
@pytest.mark.parametrize(("name", "gpu"), [("llama-2-7b", "rtx-4090"), ("gemma-2-9b", "l40s")])
def test_the_answers_are_tight(name, gpu, runtime):
    model, deploy = planner.load_model(name), Deployment(gpu=gpu, runtime=runtime)
    work = Inference(batch=2, prompt_tokens=1500, output_tokens=20, logits="last")
    context = planner.max_context_tokens(model, work, deploy)
    assert context > 0

    def fits(**change):
        return planner.estimate(model, replace(work, **change), deploy).fits

    assert fits(prompt_tokens=context - 19)
    if context < model.max_position_embeddings:
        assert not fits(prompt_tokens=context - 18)
    batch = planner.max_batch(model, work, deploy)
    assert fits(batch=batch)
    assert not fits(batch=batch + 1)


def test_nothing_fits_on_a_card_smaller_than_the_weights():
    model, work = planner.load_model("llama-3.1-70b"), Inference(batch=1, prompt_tokens=10)
    deploy = Deployment(gpu="rtx-4090")
    assert planner.max_context_tokens(model, work, deploy) == 0
    assert planner.max_batch(model, work, deploy) == 0


@given(
    name=st.sampled_from(["llama-3.1-8b", "gemma-2-9b", "phi-3-mini-4k", "gpt2", "mixtral-8x7b"]),
    runtime=st.sampled_from(["transformers", "vllm"]),
    batch=st.integers(1, 300),
    prompt=st.integers(1, 900),
    output=st.integers(1, 100),
)
@examples(40)
def test_live_memory_grows_with_batch_and_context(name, runtime, batch, prompt, output):
    model, deploy = planner.load_model(name), Deployment(gpu="h200", runtime=runtime)

    def live(b, p):
        work = Inference(batch=b, prompt_tokens=p, output_tokens=output)
        return planner.estimate(model, work, deploy).memory.peak_live_bytes

    here = live(batch, prompt)
    assert live(batch + 1, prompt) >= here
    assert live(batch, prompt + 1) >= here


@pytest.mark.parametrize("weight_dtype", ["nf4", "int8"])
def test_the_model_of_an_estimate_can_be_asked_again(weight_dtype):
    """Its weights are quantised by then, as the deployment says."""
    deploy = planner.Deployment(gpu="h200", weight_dtype=weight_dtype)
    work = planner.Inference(batch=1, prompt_tokens=64)
    found = planner.estimate(planner.load_model("gpt2"), work, deploy)
    asked = planner.max_batch(planner.load_model("gpt2"), work, deploy)
    assert planner.max_batch(found.model, work, deploy) == asked > 1


def test_the_longest_sequence_of_a_runtime_that_trains_on_two_tokens_or_more_is_found():
    work = planner.Training(batch=1, sequence_tokens=512, method="lora", lora=planner.LoRA())
    deploy = planner.Deployment(gpu="a100-40gb", runtime="litgpt")
    model = planner.load_model("pythia-1.4b")
    longest = planner.max_context_tokens(model, work, deploy)
    assert longest == model.max_position_embeddings
