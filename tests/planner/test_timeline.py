"""The timeline against the peak, which is computed without it, and against the ledger."""

from __future__ import annotations

import pytest

import planner
from planner import Deployment, Inference


def of(name, **work):
    arguments = {"batch": 2, "prompt_tokens": 300, "output_tokens": 50, **work}
    return lambda **deploy: planner.estimate(
        planner.load_model(name), Inference(**arguments), Deployment(**{"gpu": "h200", **deploy})
    )


@pytest.mark.parametrize("runtime", ["transformers", "attnlab", "vllm"])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "gemma-2-9b", "gpt2", "mistral-7b-v0.1"])
def test_the_marked_row_is_the_peak_of_the_estimate(name, runtime):
    e = of(name)(runtime=runtime)
    table = e.timeline()
    (row,) = table[table["peak"]].to_dict("records")
    assert row["live_bytes"] == e.memory.weights_bytes + e.peak.live_bytes
    assert row["live_bytes"] == table["live_bytes"].max()
    assert (row["op"], row["phase"]) == (e.peak.op, e.peak_phase)
    assert row["cache_bytes"] == e.peak.cache_bytes
    assert row["activation_bytes"] == sum(size for _, _, size in e.peak.buffers)
    if e.peak.layer is not None:
        assert row["layer"] == e.peak.layer


def test_parts_add_up_and_every_layer_is_there():
    e = of("llama-3.1-8b")()
    table = e.timeline()
    made = ["weights_bytes", "cache_bytes", "gradient_bytes", "activation_bytes"]
    parts = table[made].sum(axis=1)
    assert (parts == table["live_bytes"]).all()
    assert (table["after_bytes"] <= table["live_bytes"]).all()
    assert list(table["phase"].unique()) == ["prefill", "first decode step", "last decode step"]
    for _, rows in table.groupby("phase"):
        assert set(rows["layer"].dropna()) == set(range(32))


def test_what_lives_on_after_a_pass_is_the_cache_and_the_logits():
    e = of("llama-3.1-8b", output_tokens=1, logits="last")()
    last = e.timeline().iloc[-1]
    logits = 2 * 128_256 * 2
    held = e.memory.weights_bytes + e.memory.kv_cache_bytes + logits
    assert last["op"] == "logits"
    assert last["after_bytes"] == held


def test_only_the_pass_of_the_peak_is_drawn():
    e = of("llama-3.1-8b")()
    assert {moment.phase for moment in e.moments()} == {e.peak_phase}
    assert max(moment.live_bytes for moment in e.moments()) == e.peak.live_bytes
