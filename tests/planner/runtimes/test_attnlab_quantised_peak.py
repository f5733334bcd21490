"""Closed-form peaks over quantised caches against storages watched while real passes run."""

import math

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
from planner.program import Dims
from planner.runtimes.attnlab_formats import kv_format
from planner.runtimes.attnlab_program import Pass, forward_program
from profiles.meters import LiveTensorMeter
from tests.attnlab.drawn import models
from tests.pairs import every_pair
from tests.planner.runtimes.test_attnlab_peak import DTYPES, PASSES, attentions, model_of
from tests.properties import examples

KINDS = ("static", "dynamic", "ring", "paged")
KV_DTYPES = ("int8", "int4", "fp8")


def spec_of(kind, kv_dtype, group=None):
    return CacheSpec(
        kind=kind,
        block_tokens=8 if kind == "paged" else None,
        scales="token-head" if kv_dtype == "fp8" or group is not None else None,
        q_group_size=group,
    )


def assert_exact(model, attention, dtype, spec, kv_dtype, *, batch, passes, logits="last"):
    transformer = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    transformer.requires_grad_(False)
    capacity, measured, ours = sum(passes), [], []
    with LiveTensorMeter() as meter:
        held = build_cache(
            model,
            spec,
            batch=batch,
            tokens=capacity,
            dtype=DTYPES[dtype],
            device="cpu",
            kv_dtype=kv_dtype,
        )
        for tokens in passes:
            ids = torch.zeros(batch, tokens, dtype=torch.long)
            meter.reset_peak()
            out = transformer(ids, cache=held, logits=logits)
            measured.append(meter.peak_bytes - ids.nbytes)
            what = Pass(
                kind="prefill" if tokens == held.length else "decode",
                attention=attention,
                dtype=dtype,
                kv_dtype=kv_dtype,
                logits=logits,
                cache=spec.kind,
                block_tokens=8,
                form=kv_format(spec, kv_dtype),
            )
            program = forward_program(model, what)
            dims = Dims(batch=batch, tokens=tokens, context=held.length, capacity=capacity)
            ours.append(peak(program, dims).live_bytes)
            del out, ids
    assert ours == measured


FAMILIES = ("llama", "mistral", "gemma2", "bloom", "falcon-40b")


@every_pair(
    subject=[(family, attention) for family in FAMILIES for attention in attentions(family)],
    kind=KINDS,
    kv_dtype=KV_DTYPES,
    dtype=DTYPES,
    passes=PASSES,
)
def test_the_peak_over_every_cache_is_exact(subject, kind, kv_dtype, dtype, passes):
    (family, attention), spec = subject, spec_of(kind, kv_dtype)
    how = dict(batch=2, passes=PASSES[passes])
    assert_exact(model_of(family), attention, dtype, spec, kv_dtype, **how)


@given(
    models(max_tokens=200),
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.sampled_from(KINDS),
    st.sampled_from(KV_DTYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(DTYPES)),
    st.integers(1, 3),
)
@examples(40, fuzz=60)
def test_the_peak_of_random_models_is_exact(
    model, passes, kind, kv_dtype, grouped, naive, dtype, batch
):
    attention = "naive" if naive else choose(None, model.layers)
    group = model.layers[0].attention.head_dim // 2 if grouped else None
    spec = spec_of(kind, kv_dtype, group)
    assert_exact(model, attention, dtype, spec, kv_dtype, batch=batch, passes=passes)


@every_pair(
    subject=[(f, a) for f in FAMILIES if f != "bloom" for a in attentions(f)],
    grouped=[("int8", 8), ("int4", 8), ("int4", 4), ("int2", 4)],
    passes=[
        (29, 1, 1, 1, 1, 1),
        (7, 9, 4, 9, 1, 3),
        (3, 1, 1, 1, 1, 1, 1, 1, 1),
        (16, 16, 8),
    ],
    dtype=DTYPES,
)
def test_the_peak_over_kivis_cache_is_exact(subject, grouped, passes, dtype):
    (family, attention), (kv_dtype, group) = subject, grouped
    spec = CacheSpec(kind="quantised", q_group_size=group, residual_tokens=8)
    how = dict(batch=2, passes=passes)
    assert_exact(model_of(family), attention, dtype, spec, kv_dtype, **how)


@given(
    models(max_tokens=200),
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.sampled_from(("int8", "int4", "int2")),
    st.sampled_from((2, 6)),
    st.booleans(),
    st.sampled_from(list(DTYPES)),
    st.integers(1, 3),
)
@examples(40, fuzz=60)
def test_kivis_peak_of_random_models_is_exact(
    model, passes, kv_dtype, residual, naive, dtype, batch
):
    attention = "naive" if naive else choose(None, model.layers)
    spec = CacheSpec(kind="quantised", q_group_size=2, residual_tokens=residual)
    assert_exact(model, attention, dtype, spec, kv_dtype, batch=batch, passes=passes)


@pytest.mark.parametrize(
    ("spec", "kv_dtype"),
    [
        *((spec_of(k, d), d) for k in KINDS for d in KV_DTYPES),
        (CacheSpec(kind="quantised"), "int4"),
    ],
    ids=lambda x: getattr(x, "kind", x),
)
def test_an_estimate_over_each_quantised_cache_adds_up(spec, kv_dtype):
    model = planner.load_model("mistral-7b-v0.1")
    deploy = planner.Deployment(gpu="h200", runtime="attnlab", cache=spec, kv_dtype=kv_dtype)
    work = planner.Inference(batch=2, prompt_tokens=6000, output_tokens=100, logits="last")
    estimate = planner.estimate(model, work, deploy)
    assert estimate.table()["bytes"].sum() == estimate.memory.total_bytes
    assert estimate.memory.kv_cache_bytes == planner.kv_cache_bytes(
        model, batch=2, context_tokens=6099, dtype=kv_dtype, runtime="attnlab", cache=spec
    )
    names = {"min": min, "max": max, "ceil": math.ceil}
    for row in estimate.rows:
        text = row.substituted.replace("·", "*").replace("−", "-")
        assert row.count * eval(text, names) == row.size_bytes, row


@pytest.mark.parametrize("outputs", [1, 2, 3, 4, 9, 12])
def test_the_peak_of_a_generation_over_kivis_cache_is_that_of_its_highest_pass(outputs):
    model, passes = model_of("llama"), [21] + [1] * (outputs - 1)
    spec = CacheSpec(kind="quantised", q_group_size=8, residual_tokens=8)
    transformer = Transformer(model, dtype=torch.bfloat16, device="cpu").requires_grad_(False)
    with LiveTensorMeter() as meter:
        held = build_cache(model, spec, batch=2, tokens=1, dtype=torch.bfloat16, device="cpu")
        ids = torch.zeros(2, 21, dtype=torch.long)
        for tokens in passes:
            transformer(ids[:, :tokens], cache=held, logits="last")
        seen = meter.peak_bytes - ids.nbytes
    weights = sum(p.nbytes for p in transformer.parameters())
    deploy = planner.Deployment(gpu="h200", runtime="attnlab", dtype="bf16", cache=spec)
    work = planner.Inference(batch=2, prompt_tokens=21, output_tokens=outputs, logits="last")
    estimate = planner.estimate(model, work, deploy)
    assert estimate.memory.peak_live_bytes - estimate.memory.weights_bytes == seen
    assert weights < estimate.memory.weights_bytes  # and rotary tables


@pytest.mark.parametrize("kv_dtype", ["int8", "int4"])
def test_a_sweep_has_what_estimates_have(kv_dtype):
    grid = planner.sweep(
        ["llama-3.1-8b"],
        ["h200"],
        [1, 7],
        [100, 8192],
        runtime=("attnlab",),
        kv_dtype=(kv_dtype,),
        output_tokens=8,
    )
    model = planner.load_model("llama-3.1-8b")
    for row in grid.to_dict("records"):
        prompt = row["context_tokens"] - 7
        work = planner.Inference(
            batch=row["batch"], prompt_tokens=prompt, output_tokens=8, logits="last"
        )
        deploy = planner.Deployment(gpu="h200", runtime="attnlab", kv_dtype=kv_dtype)
        memory = planner.estimate(model, work, deploy).memory
        assert row["kv_cache_bytes"] == memory.kv_cache_bytes
        assert row["total_bytes"] == memory.total_bytes


def test_decoding_over_codes_needs_a_layers_keys_and_values_in_full_besides():
    """A reference: a kernel that reads codes would not."""
    model = planner.load_model("llama-3.1-8b")
    work = planner.Inference(batch=8, prompt_tokens=8192, output_tokens=64, logits="last")
    plain, quantised = (
        planner.estimate(
            model, work, planner.Deployment(gpu="h200", runtime="attnlab", kv_dtype=dtype)
        )
        for dtype in ("bf16", "int8")
    )
    codes, full = quantised.memory.kv_cache_bytes, plain.memory.kv_cache_bytes
    assert codes / full == pytest.approx((128 + 4) / 256)
    assert quantised.memory.total_bytes < plain.memory.total_bytes
