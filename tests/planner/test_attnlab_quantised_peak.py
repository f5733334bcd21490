"""Closed-form peaks over quantised caches against storages watched while real passes run."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
from tests.planner.test_attnlab_peak import DTYPES, PASSES, attentions, model_of

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


@pytest.mark.parametrize("passes", PASSES.values(), ids=PASSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, a) for f in ("llama", "mistral", "gemma2", "bloom", "falcon-40b") for a in attentions(f)],
)
def test_the_peak_over_every_cache_is_exact(family, attention, kind, kv_dtype, dtype, passes):
    spec = spec_of(kind, kv_dtype)
    assert_exact(model_of(family), attention, dtype, spec, kv_dtype, batch=2, passes=passes)


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
@settings(max_examples=60, deadline=None)
def test_the_peak_of_random_models_is_exact(
    model, passes, kind, kv_dtype, grouped, naive, dtype, batch
):
    attention = "naive" if naive else choose(None, model.layers)
    group = model.layers[0].attention.head_dim // 2 if grouped else None
    spec = spec_of(kind, kv_dtype, group)
    assert_exact(model, attention, dtype, spec, kv_dtype, batch=batch, passes=passes)


@pytest.mark.parametrize(
    "passes", [[29, 1, 1, 1, 1, 1], [7, 9, 4, 9, 1, 3], [3, 1, 1, 1, 1, 1, 1, 1, 1], [16, 16, 8]]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kv_dtype", "group"), [("int8", 8), ("int4", 8), ("int4", 4), ("int2", 4)]
)
@pytest.mark.parametrize(
    ("family", "attention"),
    [(f, a) for f in ("llama", "mistral", "gemma2", "falcon-40b") for a in attentions(f)],
)
def test_the_peak_over_kivis_cache_is_exact(family, attention, kv_dtype, group, dtype, passes):
    spec = CacheSpec(kind="quantised", q_group_size=group, residual_tokens=8)
    assert_exact(model_of(family), attention, dtype, spec, kv_dtype, batch=2, passes=passes)


@given(
    models(max_tokens=200),
    st.lists(st.integers(1, 50), min_size=1, max_size=4),
    st.sampled_from(("int8", "int4", "int2")),
    st.sampled_from((2, 6)),
    st.booleans(),
    st.sampled_from(list(DTYPES)),
    st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_kivis_peak_of_random_models_is_exact(
    model, passes, kv_dtype, residual, naive, dtype, batch
):
    attention = "naive" if naive else choose(None, model.layers)
    spec = CacheSpec(kind="quantised", q_group_size=2, residual_tokens=residual)
    assert_exact(model, attention, dtype, spec, kv_dtype, batch=batch, passes=passes)
