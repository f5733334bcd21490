"""Inverse questions: tight by their definition, with reasons that hold when they are tried."""

from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from planner.capacity.answers import changes
from tests.properties import examples

LLAMA = planner.load_model("llama-3.1-8b")
WORK = planner.Inference(batch=4, prompt_tokens=2048, output_tokens=100, logits="last")


def on(gpu="rtx-4090", runtime="vllm", **more):
    return planner.Deployment(gpu=gpu, runtime=runtime, **more)


def fits(model, work, deploy):
    try:
        return planner.estimate(model, work, deploy).fits
    except ConfigError:
        return False


@examples(25)
@given(
    model=st.sampled_from(["gemma-2-9b", "mistral-7b-v0.1", "llama-3.1-8b", "gpt2"]),
    runtime=st.sampled_from(["vllm", "transformers", "attnlab", "llama.cpp"]),
    gpu=st.sampled_from(["t4", "rtx-4090", "a100-40gb"]),
    batch=st.integers(1, 40),
    output=st.sampled_from([1, 2, 300]),
)
def test_limits_are_tight(model, runtime, gpu, batch, output):
    model, deploy = planner.load_model(model), on(gpu, runtime)
    work = planner.Inference(batch=batch, prompt_tokens=64, output_tokens=output, logits="last")
    longest = planner.max_context_tokens(model, work, deploy)
    largest = planner.max_batch(model, work, deploy)
    prompt = longest - output + 1
    if longest:
        assert fits(model, replace(work, prompt_tokens=prompt), deploy)
    assert not fits(model, replace(work, prompt_tokens=max(prompt, 0) + 1), deploy)
    if largest:
        assert fits(model, replace(work, batch=largest), deploy)
    assert not fits(model, replace(work, batch=largest + 1), deploy)


def test_a_limit_holds_for_every_smaller_number_where_blocks_are_given_back():
    """vLLM frees blocks behind a window, so memory does not grow token by token."""
    model = planner.read_config(
        {
            **planner.load_model("mistral-7b-v0.1").config,
            "sliding_window": 40,
            "max_position_embeddings": 3000,
        }
    )
    held = [
        planner.kv_cache_bytes(model, batch=1, context_tokens=n, runtime="vllm")
        for n in range(1, 300)
    ]
    assert sorted(held) != held  # it is not monotone
    deploy = on("rtx-4090", memory_utilization=0.71)
    for batch in (3000, 5000, 700):
        work = planner.Inference(batch=batch, prompt_tokens=1, logits="last")
        most = planner.max_context_tokens(model, work, replace(deploy, max_sequences=9999))
        all_fit = [
            fits(model, replace(work, prompt_tokens=n), replace(deploy, max_sequences=9999))
            for n in range(1, 200)
        ]
        first = all_fit.index(False) if False in all_fit else 3000
        assert most == first


def test_memory_of_runtimes_without_a_pool_grows_with_batch_and_context():
    for runtime in ("transformers", "attnlab", "llama.cpp"):
        table = planner.sweep(
            "gemma-2-9b", "h200", [1, 2, 3, 7, 8], range(1, 8000, 37), runtime=runtime
        )
        grid = planner.fit_map(table, "peak_live_bytes")
        assert (grid.diff(axis=0).iloc[1:] >= 0).all().all()
        assert (grid.diff(axis=1).iloc[:, 1:] >= 0).all().all()


def test_answers_carry_the_numbers_and_what_ends_them():
    for deploy in (on(), on(runtime="transformers"), on("h200")):
        longest = planner.longest_context(LLAMA, WORK, deploy)
        assert longest.value == planner.max_context_tokens(LLAMA, WORK, deploy)
        largest = planner.largest_batch(LLAMA, WORK, deploy)
        assert largest.value == planner.max_batch(LLAMA, WORK, deploy)
    assert planner.longest_context(LLAMA, WORK, on()).binding.startswith("the KV pool of")
    assert planner.longest_context(LLAMA, WORK, on("h200")).binding == (
        "the model's 131,072 positions"
    )
    one = planner.largest_batch(LLAMA, replace(WORK, prompt_tokens=8), on("h200"))
    assert one.binding == "max_sequences=1,024"
    small = planner.longest_context(planner.load_model("llama-3.1-70b"), WORK, on())
    assert (small.value, small.binding) == (0, "weights and the profile run leave no KV pool")


def test_each_relief_is_what_the_change_gives():
    deploy = on()
    answer = planner.longest_context(LLAMA, WORK, deploy)
    assert [r.gain for r in answer.reliefs] == sorted(
        (r.gain for r in answer.reliefs), reverse=True
    )
    tried = dict(changes(deploy))
    for relief in answer.reliefs:
        assert relief.value == planner.max_context_tokens(LLAMA, WORK, tried[relief.change])
        assert relief.gain == relief.value - answer.value > 0
    assert any(relief.change == "fp8 KV" for relief in answer.reliefs)
    assert "fp8 KV: " in answer.in_words


def test_fp8_keys_and_values_double_what_a_pool_holds():
    """ "fp8 KV cache … roughly doubles the amount of space" (vLLM docs, Quantized KV Cache)."""
    deploy = on("h200", max_sequences=100_000)
    plain = planner.max_batch(LLAMA, WORK, deploy)
    assert planner.max_batch(LLAMA, WORK, replace(deploy, kv_dtype="fp8")) in (
        2 * plain,
        2 * plain + 1,
    )


def test_training_has_its_own_ways_out():
    work = planner.Training(batch=2, sequence_tokens=2048)
    answer = planner.longest_context(LLAMA, work, on("h200", "attnlab"))
    assert any(relief.change == "full checkpointing" for relief in answer.reliefs)


def test_fewest_gpus_are_the_first_layout_that_fits():
    model = planner.load_model("llama-3.1-70b")
    assert planner.min_gpus(model, WORK, on("h100-80gb")) == 2
    for gpus, expected in ((1, False), (2, True)):
        assert fits(model, WORK, on("h100-80gb", tensor_parallel=gpus)) is expected
    assert planner.min_gpus(LLAMA, WORK, on("h200")) == 1
    assert planner.min_gpus(model, WORK, on("h100-80gb", "transformers")) is None


def test_the_ladder_says_how_many_of_each_gpu_or_why_none():
    model = planner.load_model("llama-3.1-70b")
    names = ["h100-80gb", "rtx-4090", "h200"]
    table = planner.gpu_ladder(model, WORK, on(), names=names).set_index("gpu")
    for name in names:
        n = table.loc[name, "gpus"]
        assert n == planner.min_gpus(model, WORK, on(name))
    priced = planner.gpu_ladder(
        model, WORK, on(), names=names,
        price_per_hour={"h100-80gb": 3.0, "rtx-4090": 0.4, "h200": 4.0},
    )  # fmt: skip
    assert list(priced["gpu"]) == ["rtx-4090", "h100-80gb", "h200"]
    assert priced["price_per_hour"].iloc[0] == pytest.approx(0.4 * table.loc["rtx-4090", "gpus"])
    none = planner.gpu_ladder(model, WORK, on(runtime="transformers"), names=["t4"])
    assert none["gpus"].isna().all()
    assert "NVIDIA T4" in none["why_not"].iloc[0]
    assert planner.cheapest_gpu(model, WORK, on(runtime="transformers"), names=["t4"]) is None
    assert planner.cheapest_gpu(LLAMA, WORK, on(), names=["h200", "rtx-4090"]) == "rtx-4090"


def test_the_largest_model_is_the_one_with_most_parameters_that_fits():
    models = ["gpt2", "llama-3.1-8b", "llama-3.1-70b"]
    assert planner.largest_model(WORK, on(), models=models) == "llama-3.1-8b"
    assert planner.largest_model(WORK, on("t4"), models=["llama-3.1-70b"]) is None


@pytest.mark.parametrize(
    "after", [on(kv_dtype="fp8"), on("h200"), on(tensor_parallel=2), on(runtime="transformers")]
)
def test_a_what_if_attributes_the_whole_change(after):
    a, b = planner.estimate(LLAMA, WORK, on()), planner.estimate(LLAMA, WORK, after)
    table = planner.what_if(a, b)
    sums, items = table[table["item"] == "in all"], table[table["item"] != "in all"]
    total = sums.set_index("component")
    assert total.loc["total", "change_bytes"] == b.memory.total_bytes - a.memory.total_bytes
    parts = total.drop("total")
    assert parts["change_bytes"].sum() == total.loc["total", "change_bytes"]
    for component, part in parts.iterrows():
        mine = items[items["component"] == component]
        assert mine["change_bytes"].sum() == part["change_bytes"]
    assert isinstance(table, pd.DataFrame)


@pytest.mark.parametrize(
    "ask",
    [planner.estimate, planner.max_batch, planner.max_context_tokens, planner.min_gpus],
)
@pytest.mark.parametrize("place", ["model", "work", "deploy"])
def test_a_question_put_with_a_name_in_place_of_what_it_names_is_refused_in_one_line(ask, place):
    asked = {
        "model": planner.load_model("llama-50m"),
        "work": planner.Inference(batch=1, prompt_tokens=8),
        "deploy": planner.Deployment(gpu="h200"),
    }
    with pytest.raises(ConfigError, match=f"^{place}='a name' is not allowed: an? "):
        ask(**asked | {place: "a name"})


def test_flags_and_grids_of_another_kind_are_refused():
    with pytest.raises(ConfigError, match=r"padded=\[\] is not allowed: True or False"):
        planner.Inference(batch=1, prompt_tokens=8, padded=[])
    with pytest.raises(ConfigError, match="context_tokens=None"):
        planner.sweep("llama-50m", "h200", 1, None)
