"""attnlab's closed-form peaks against storages watched while the real passes run on the CPU."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planner
from attnlab.caches import build_cache
from attnlab.implementations import choose
from attnlab.transformer import Transformer
from planner import CacheSpec
from planner.activations import peak
from planner.layers import MLA, NoPositions, RoPE
from planner.program import Dims
from planner.runtimes.attnlab_program import Pass, forward_program
from profiles.meters import LiveTensorMeter
from tests.attnlab.drawn import models
from tests.attnlab.families import FAMILIES, PLANNED
from tests.pairs import every_pair
from tests.properties import examples

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


def live_peaks(model, attention, dtype, kv_dtype, kind, batch, passes, logits, latent=None):
    """(tokens, context, highest bytes of live storages) of each pass."""
    transformer = Transformer(
        model, attention=attention, dtype=DTYPES[dtype], device="cpu", latent=latent
    )
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


def predicted(
    model, attention, dtype, kv_dtype, kind, batch, tokens, context, capacity, logits, latent=None
):
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
            latent=latent or ("absorbed" if tokens == 1 else "expanded"),
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
    latent = any(isinstance(layer.attention, MLA) for layer in model_of(family).layers)
    if latent or family in ("gemma2", "gpt_oss"):  # values of another width: no fused CPU kernel
        return ("naive",)
    return ("sdpa", "naive")


@every_pair(subject=[(f, a) for f in PLANNED for a in attentions(f)], dtype=DTYPES, passes=PASSES)
def test_the_peak_of_every_family_is_exact(subject, dtype, passes):
    assert_exact(*subject, dtype, "static", batch=2, passes=PASSES[passes])


CACHED = ("llama", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "bloom", "falcon-40b")


@every_pair(
    subject=[(family, attention) for family in CACHED for attention in attentions(family)],
    kind=KINDS[1:],
    dtypes=[("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "bf16")],
    passes=PASSES,
)
def test_the_peak_over_every_cache_is_exact(subject, kind, dtypes, passes):
    dtype, kv_dtype = dtypes
    what = dict(batch=2, passes=PASSES[passes], logits="last", kv_dtype=kv_dtype)
    assert_exact(*subject, dtype, kind, **what)


@given(
    models(max_tokens=200, routed=True),
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from([("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "bf16")]),
    st.integers(1, 3),
    st.sampled_from(["all", "last"]),
)
@examples(30, fuzz=60)
def test_the_peak_of_random_models_is_exact(model, passes, kind, naive, dtypes, batch, logits):
    attention = "naive" if naive else choose(None, model.layers)
    what = (model, attention, *dtypes, kind, batch)
    seen = live_peaks(*what, passes, logits)
    ours = [predicted(*what, t, s, sum(passes), logits) for t, s, _ in seen]
    assert ours == [measured for _, _, measured in seen]


@st.composite
def latents(draw, *, fused=None):
    """A model of one kind of layer with latent attention, its experts or not.

    `fused`: of widths that the CPU has a fused kernel for, keys as wide as values.
    """
    nope, rope = draw(st.integers(1, 9)), 2 * draw(st.integers(0 if fused else 1, 4))
    if fused == "absorbed":
        rope = 0
    mla = MLA(
        num_attention_heads=draw(st.integers(1, 4)),
        q_lora_rank=draw(st.none() | st.integers(1, 20)),
        kv_lora_rank=draw(st.integers(1, 30)),
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=nope + rope if fused == "expanded" else draw(st.integers(1, 12)),
        scaling=0.3,
        bias=draw(st.booleans()),
        rope_interleave=draw(st.booleans()),
    )
    model = draw(models(max_tokens=200, routed=True))
    turning = RoPE(rope_theta=1e4, rotary_dim=rope, interleaved=draw(st.booleans())) if rope else 0
    layers = tuple(replace(layer, attention=mla) for layer in model.layers)
    positions = turning or NoPositions()
    return replace(model, layers=layers, positions=positions, local_positions=None)


def assert_latent_exact(model, attention, latent, passes, dtypes, kind, batch):
    what = (model, attention, *dtypes, kind, batch)
    seen = live_peaks(*what, passes, "last", latent)
    ours = [predicted(*what, t, s, sum(passes), "last", latent) for t, s, _ in seen]
    assert ours == [measured for _, _, measured in seen]


LATENT = dict(
    passes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    dtypes=st.sampled_from([("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "bf16")]),
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 3),
)


@given(latents(), st.sampled_from([None, "expanded", "absorbed"]), st.fixed_dictionaries(LATENT))
@examples(30, fuzz=60)
def test_the_peak_of_random_latent_attention_is_exact(model, latent, how):
    assert_latent_exact(model, "naive", latent, **how)


@pytest.mark.parametrize("latent", ["expanded", "absorbed"])
@given(st.data(), st.fixed_dictionaries(LATENT))
@examples(20, fuzz=40)
def test_the_peak_of_fused_latent_attention_is_exact(latent, data, how):
    assert_latent_exact(data.draw(latents(fused=latent)), "sdpa", latent, **how)


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
