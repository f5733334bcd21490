"""attnlab's closed-form peaks against storages watched while the real passes run on the CPU."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from attnlab.caches import build_cache
from attnlab.implementations import choose
from attnlab.transformer import Transformer
from planner import CacheSpec
from planner.activations import peak
from planner.program import Dims
from planner.runtimes.attnlab_program import Pass, forward_program
from profiles.meters import LiveTensorMeter
from tests.attnlab.drawn import models
from tests.attnlab.families import FAMILIES, PLANNED

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = ("static", "dynamic", "ring", "paged")
PROMPT = 29
PASSES = {
    "whole prompt and steps": [PROMPT, 1, 1],
    "chunks and a step": [7, 9, 4, 9, 1],
}


@cache
def model_of(family):
    return planner.read_config(FAMILIES[family]().to_dict())


def live_peaks(model, attention, dtype, kv_dtype, kind, batch, passes, logits):
    """(tokens, context, highest bytes of live storages) of each pass."""
    transformer = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    transformer.requires_grad_(False)
    seen = []
    with LiveTensorMeter() as meter:
        held = build_cache(
            model,
            CacheSpec(kind=kind, block_tokens=8 if kind == "paged" else None),
            batch=batch,
            tokens=sum(passes),
            dtype=DTYPES[kv_dtype],
            device="cpu",
        )
        for tokens in passes:
            ids = torch.zeros(batch, tokens, dtype=torch.long)
            meter.reset_peak()
            out = transformer(ids, cache=held, logits=logits)
            seen.append((tokens, held.length, meter.peak_bytes - ids.nbytes))
            del out, ids
    return seen


def predicted(model, attention, dtype, kv_dtype, kind, batch, tokens, context, capacity, logits):
    program = forward_program(
        model,
        Pass(
            kind="prefill" if tokens == context else "decode",
            attention=attention,
            dtype=dtype,
            kv_dtype=kv_dtype,
            logits=logits,
            cache=kind,
            block_tokens=8,
        ),
    )
    dims = Dims(batch=batch, tokens=tokens, context=context, capacity=capacity)
    return peak(program, dims).live_bytes


def assert_exact(family, attention, dtype, kind, *, batch, passes, logits="all", kv_dtype=None):
    model = model_of(family)
    settings = (model, attention, dtype, kv_dtype or dtype, kind, batch)
    seen = live_peaks(*settings, passes, logits)
    ours = [predicted(*settings, t, s, sum(passes), logits) for t, s, _ in seen]
    assert ours == [measured for _, _, measured in seen]


def attentions(family):
    return ("naive",) if family in ("gemma2", "gpt_oss") else ("sdpa", "naive")


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("family", "attention"), [(f, a) for f in PLANNED for a in attentions(f)])
def test_the_peak_of_every_family_is_exact(family, attention, dtype, passes):
    assert_exact(family, attention, dtype, "static", batch=2, passes=passes)


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"), [("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16")]
)
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize(
    ("family", "attention"),
    [
        (family, attention)
        for family in (
            "llama",
            "mistral",
            "gemma2",
            "gemma3",
            "phi3",
            "gpt2",
            "bloom",
            "falcon-40b",
        )
        for attention in attentions(family)
    ],
)
def test_the_peak_over_every_cache_is_exact(family, attention, kind, dtype, kv_dtype, passes):
    assert_exact(
        family, attention, dtype, kind, batch=2, passes=passes, logits="last", kv_dtype=kv_dtype
    )


@given(
    models(max_tokens=200, routed=True),
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from([("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "bf16")]),
    st.integers(1, 3),
    st.sampled_from(["all", "last"]),
)
@settings(max_examples=60, deadline=None)
def test_the_peak_of_random_models_is_exact(model, passes, kind, naive, dtypes, batch, logits):
    attention = "naive" if naive else choose(None, model.layers)
    what = (model, attention, *dtypes, kind, batch)
    seen = live_peaks(*what, passes, logits)
    ours = [predicted(*what, t, s, sum(passes), logits) for t, s, _ in seen]
    assert ours == [measured for _, _, measured in seen]


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_over_each_cache_adds_up(kind):
    model = planner.load_model("mistral-7b-v0.1")
    deploy = planner.Deployment(gpu="h200", runtime="attnlab", cache=CacheSpec(kind=kind))
    work = planner.Inference(batch=2, prompt_tokens=6000, output_tokens=100, logits="last")
    estimate = planner.estimate(model, work, deploy)
    assert estimate.table()["bytes"].sum() == estimate.memory.total_bytes
    held = {"static": 6099, "dynamic": 6099, "ring": 4096, "paged": 6112}[kind]
    assert estimate.memory.kv_cache_bytes == 2 * 32 * 2 * 8 * 128 * held * 2
    for row in estimate.rows:
        text = row.substituted.replace("·", "*").replace("−", "-")
        assert row.count * eval(text, {"min": min, "max": max}) == row.size_bytes, row


def test_a_growing_cache_holds_one_layers_keys_twice_for_a_moment():
    model = planner.load_model("llama-3.1-8b")
    what = (model, "sdpa", "bf16", "bf16")
    static, dynamic = (
        predicted(*what, kind, 8, 1, 8193, 8193, "last") for kind in ("static", "dynamic")
    )
    one_tensor = 8 * 8 * 8192 * 128 * 2
    assert 0.9 * one_tensor < dynamic - static < 1.1 * one_tensor
