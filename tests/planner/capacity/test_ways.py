"""What makes a plan fit: it does when it is tried, and two changes are named only where one is not
enough.
"""

from dataclasses import fields, replace

import pytest

import planner

INFERENCE = planner.Inference(batch=4, prompt_tokens=32768, output_tokens=256, logits="last")
PLANS = {
    "llama-3.1-70b": (
        INFERENCE,
        planner.Deployment(gpu="h100-80gb", runtime="vllm", tensor_parallel=2),
    ),
    "llama-3.1-8b": (
        planner.Training(batch=2, sequence_tokens=2048),
        planner.Deployment(gpu="rtx-4090"),
    ),
}


def changed(asked, sets):
    return replace(asked, **{k: v for k, v in sets.items() if k in {f.name for f in fields(asked)}})


@pytest.mark.parametrize(("name", "words"), [("llama-3.1-70b", 1), ("llama-3.1-8b", 2)])
def test_every_way_fits_when_it_is_tried_and_takes_as_few_changes_as_there_must_be(name, words):
    model, (work, deploy) = planner.load_model(name), PLANS[name]
    assert not planner.estimate(model, work, deploy).fits
    ways = planner.ways_to_fit(model, work, deploy)
    assert ways
    for way in ways:
        tried = planner.estimate(model, changed(work, way.sets), changed(deploy, way.sets))
        assert tried.fits
        assert tried.headroom_bytes == way.estimate.headroom_bytes
        assert len(way.change.split(" and ")) == words


def test_where_no_change_is_enough_the_fewest_gpus_are_a_way():
    model, work = planner.load_model("llama-3.1-70b"), replace(INFERENCE, prompt_tokens=1024)
    deploy = planner.Deployment(gpu="rtx-4090", runtime="vllm")
    (way,) = planner.ways_to_fit(model, work, deploy)
    assert way.change.startswith(f"{planner.min_gpus(model, work, deploy)} GPUs")


def test_sharded_training_has_answers_and_a_way_of_more_gpus():
    model, work = (
        planner.load_model("llama-3.1-70b"),
        planner.Training(batch=1, sequence_tokens=512),
    )
    deploy = planner.Deployment(gpu="h100-80gb", data_parallel_shards=2)
    assert planner.longest_context(model, work, deploy).value == 0
    ways = planner.ways_to_fit(model, work, deploy)
    assert f"{planner.min_gpus(model, work, deploy)} GPUs" in [way.change for way in ways]


def test_only_the_fields_that_may_be_set_are():
    model, (work, deploy) = planner.load_model("llama-3.1-70b"), PLANS["llama-3.1-70b"]
    (way,) = planner.ways_to_fit(model, work, deploy, only=frozenset({"weight_dtype"}))
    assert way.sets == {"weight_dtype": "fp8"}
    assert planner.ways_to_fit(model, work, deploy, only=frozenset()) == ()
