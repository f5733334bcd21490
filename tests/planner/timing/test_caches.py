"""Passes over other caches than the usual one, on the clock."""

import pytest

import planner
from planner.runtimes import runtime_named
from planner.timing.op_kinds import Bytes, timed_ops


def of(name, *, prompt_tokens=1024, batch=2, output_tokens=2, **deployment):
    work = planner.Inference(
        batch=batch, prompt_tokens=prompt_tokens, output_tokens=output_tokens, logits="last"
    )
    return planner.estimate(
        planner.load_model(name), work, planner.Deployment(gpu="h200", **deployment)
    )


def attention_s(e):
    table = e.op_times("prefill")
    return table[table.op == "attention"].total_s.sum()


def test_a_window_that_a_static_cache_has_room_for_is_a_mask():
    """masking_utils._ignore_causal_mask_sdpa: no mask is left out from a window's width on."""
    room = planner.CacheSpec(kind="static", capacity_tokens=8192)
    grows, static = (
        of("mistral-7b-v0.1", runtime="transformers", cache=cache) for cache in (None, room)
    )
    assert attention_s(static) > 4 * attention_s(grows)
    assert static.latency.tpot_s > grows.latency.tpot_s


def test_without_a_window_a_prompt_attends_to_itself_alone():
    room = planner.CacheSpec(kind="static", capacity_tokens=8192)
    grows, static = (
        of("llama-3.1-8b", runtime="transformers", cache=cache) for cache in (None, room)
    )
    assert attention_s(static) == pytest.approx(attention_s(grows), rel=0.01)


def test_a_prompt_beyond_the_window_is_behind_a_mask_in_attnlab():
    within, beyond = (
        of("mistral-7b-v0.1", runtime="attnlab", prompt_tokens=tokens) for tokens in (4096, 4100)
    )
    assert attention_s(beyond) > 1.5 * attention_s(within)


def test_codes_are_read_by_kernels_that_convert_each_element():
    """Slots lie between what is read, and a scale is another float."""
    e = of("llama-3.1-8b", runtime="attnlab", kv_dtype="int8", mode="captured")
    program = runtime_named("attnlab").decode(e.share.model, e.work, e.setting)
    read = [t for t in timed_ops(program) if t.op.name in ("read keys", "read values")]
    assert {t.kind for t in read} == {Bytes(kind="strided cast", launched=True)}
    assert sum(t.count for t in read) == 4 * len(e.model.layers)


def test_packed_codes_take_a_shift_for_each_place_and_are_masked():
    layers = len(planner.load_model("llama-3.1-8b").layers)
    counts = {}
    for dtype in ("int8", "int4"):
        e = of("llama-3.1-8b", runtime="attnlab", kv_dtype=dtype, mode="captured")
        program = runtime_named("attnlab").decode(e.share.model, e.work, e.setting)
        counts[dtype] = sum(timed.count for timed in timed_ops(program))
    encoded, decoded = 3, 4  # added, shifted, summed; two shifts, masked, less eight
    assert counts["int4"] - counts["int8"] == 2 * layers * (encoded + decoded)


def test_soft_capped_attention_casts_all_keys_and_values():
    e = of("gemma-2-9b", runtime="attnlab", mode="captured")
    table = e.op_times()
    wide = table[table.op.isin(["float32 keys", "float32 values"])]
    assert wide["count"].sum() == 2 * len(e.model.layers)
    assert wide.total_s.sum() > 0
