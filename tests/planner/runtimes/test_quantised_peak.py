"""Closed-form peaks with a quantised cache against storages watched while transformers runs."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch

import planner
from planner import CacheSpec, ConfigError, Deployment, Inference
from planner.activations import peak
from planner.program import Dims
from planner.runtimes.quantised_cache import quantised_cache
from planner.runtimes.transformers_code.forward import pass_program
from planner.runtimes.transformers_code.regime import Pass, Regime
from tests.pairs import every_pair
from tests.planner.configs import TINY, build
from tests.planner.quantised import (
    QuantisedMeter,
    live_quantised_cache,
    needs_hqq,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SETTINGS = {
    "int4": {"q_group_size": 8, "residual_tokens": 3},
    "int4, no residual": {"q_group_size": 8, "residual_tokens": 0},
    "int2, along channels": {
        "q_group_size": 2,
        "residual_tokens": 2,
        "axis_key": -1,
        "axis_value": -1,
    },
    "fp8": {},
}
SUBJECTS = [
    ("llama", "sdpa"),
    ("llama", "eager"),
    ("gpt2", "sdpa"),
    ("gpt2", "eager"),
    ("mistral full, wide heads", "eager"),
    ("deepseek_v3", "sdpa"),
    ("deepseek_v3", "eager"),
    ("gemma2 without sliding layers", "eager"),
]
ALONG_CHANNELS = [("llama", "sdpa"), ("deepseek_v3", "eager"), ("gpt2", "sdpa")]
# few tokens: the feed-forward wins the peak; many: attention does
SHAPES = [("bf16", 2, 8), ("fp32", 1, 64), ("bf16", 2, 200)]


@every_pair(
    dict(subject=SUBJECTS, setting=("int4", "fp8"), shape=SHAPES),
    dict(subject=ALONG_CHANNELS, setting=("int2, along channels",), shape=SHAPES),
    dict(subject=SUBJECTS[:1], setting=("int4, no residual",), shape=SHAPES),
)
def test_peak_is_exact_at_prefill_and_over_decode_steps(unpack_in_python, subject, setting, shape):
    seen, ours = peaks(*subject, SETTINGS[setting], setting.split(",")[0], *shape)
    assert ours == seen


@needs_hqq
@pytest.mark.parametrize(
    ("dtype", "axis"),
    [(f"int{bits}", axis) for bits in (8, 4, 3, 2, 1) for axis in (0, 1) if (bits, axis) != (3, 1)],
)
@pytest.mark.parametrize(
    ("name", "computed", "tokens"), [("llama", "bf16", 256), ("deepseek_v3", "fp32", 64)]
)
def test_peak_with_hqq_is_exact_on_a_cpu(name, computed, tokens, dtype, axis):
    options = {"backend": "hqq", "q_group_size": 8, "residual_tokens": 4}
    options |= {"axis_key": axis, "axis_value": axis}
    seen, ours = peaks(name, "sdpa", options, dtype, computed, 2, tokens)
    assert ours == seen


def peaks(name, attention, options, dtype, computed, batch, tokens, *, steps=5):
    """Peaks of a prefill and the decode steps after it: watched, and ours."""
    live = build(TINY[name], device="cpu", dtype=DTYPES[computed], attention=attention)
    ids = torch.randint(1, 99, (batch, tokens))
    cache = live_quantised_cache(live.config, dtype, **options)
    described = quantised_cache(CacheSpec(kind="quantised", **options), dtype)
    model = planner.read_config(TINY[name])
    seen, ours = [], []
    with torch.no_grad(), QuantisedMeter() as meter:
        for step in range(steps):
            meter.reset_peak()
            out = live(ids if step == 0 else ids[:, :1], past_key_values=cache, use_cache=True)
            seen.append(meter.peak_bytes)
            del out
            what = Pass(
                kind="decode" if step else "prefill",
                attention=attention,
                dtype=computed,
                device="cpu",
                kv_dtype=dtype,
                quantised=described,
                residual_tokens=max(0, step - 1) % max(1, described.form.residual_tokens),
            )
            dims = Dims(batch=batch, tokens=1 if step else tokens, context=tokens + step)
            program = pass_program(model, what, Regime.of(model, dims))
            ours.append(peak(program, dims).live_bytes)
    return seen, ours


def estimate_of(prompt=8192, output=1, cache=None, **more):
    work = Inference(batch=1, prompt_tokens=prompt, output_tokens=output, logits="last")
    deploy = Deployment(**{"gpu": "h200", "cache": cache, **more})
    return planner.estimate(planner.load_model("llama-3.1-8b"), work, deploy)


@pytest.mark.parametrize(
    ("kv_dtype", "cache"),
    [
        ("int4", None),
        ("int2", CacheSpec(kind="quantised", q_group_size=32, axis_key=-1)),
        ("int8", None),
        ("int3", None),
        ("fp8", None),
    ],
)
@pytest.mark.parametrize(("prompt", "output"), [(64, 1), (2048, 400)])
def test_the_ledger_opens_codes_scales_and_residual(kv_dtype, cache, prompt, output):
    e = estimate_of(prompt, output, cache, kv_dtype=kv_dtype)
    kv = [row for row in e.rows if row.component == "kv_cache"]
    assert sum(row.size_bytes for row in kv) == e.memory.kv_cache_bytes
    parts = {row.item.rsplit(", ")[-1] for row in kv}
    scales = {"scales"} if kv_dtype == "fp8" else {"scales and zero points", "residual"}
    assert scales < parts
    for row in e.rows:
        text = row.substituted.replace("·", "*").replace("−", "-")
        numbers = {"min": min, "max": max, "ceil": math.ceil}
        assert row.count * eval(text, numbers) == row.size_bytes, row
    assert e.table()["bytes"].sum() == e.memory.total_bytes
    counted = planner.kv_cache_bytes(
        e.model,
        batch=1,
        context_tokens=prompt + output - 1,
        decoded_tokens=output - 1,
        dtype=kv_dtype,
        cache=cache,
    )
    assert counted == e.memory.kv_cache_bytes


def test_scratch_stands_apart_where_it_makes_the_peak():
    e = estimate_of(60_000, 129, kv_dtype="int4", gpu="h200", dtype="bf16")
    items = {row.item for row in e.rows if row.component == "activations"}
    assert e.peak_phase == "prefill"
    assert "quantisation scratch" not in items
    long = planner.Inference(batch=64, prompt_tokens=2, output_tokens=2_049, logits="last")
    e = planner.estimate(planner.load_model("llama-3.1-8b"), long, e.deploy)
    items = {row.item for row in e.rows if row.component == "activations"}
    assert e.peak_phase == "last step that quantises anew"
    assert {"quantisation scratch", "dequantised keys, values", "joined keys, values"} <= items


def test_a_cache_of_no_dtype_is_one_of_four_bits():
    kind = CacheSpec(kind="quantised")
    assert estimate_of(cache=kind).rows == estimate_of(kv_dtype="int4").rows


@pytest.mark.parametrize("kv_dtype", ["int4", "fp8"])
@pytest.mark.parametrize("output", [1, 2, 3, 4, 9, 12])
def test_the_phases_hold_the_highest_of_all_steps(unpack_in_python, kv_dtype, output):
    cache = None
    if kv_dtype == "int4":
        cache = CacheSpec(kind="quantised", q_group_size=8, residual_tokens=4)
    model = planner.read_config(TINY["llama"])
    work = Inference(batch=2, prompt_tokens=8, output_tokens=output)
    deploy = Deployment(gpu="cpu", dtype="bf16", kv_dtype=kv_dtype, cache=cache)
    highest = planner.estimate(model, work, deploy).peak.live_bytes
    options = {"q_group_size": 8, "residual_tokens": 4} if cache else {}
    every, _ = peaks("llama", "sdpa", options, kv_dtype, "bf16", 2, 8, steps=output)
    assert highest == max(every)


def test_hqq_on_a_gpu_is_marked():
    assert "searching in float16, was not watched" in estimate_of(kv_dtype="int8").peak_note
    assert estimate_of(kv_dtype="int4").peak_note == ""


@pytest.mark.parametrize(
    ("cache", "kv_dtype", "message"),
    [
        ({"backend": "quanto"}, "int8", "cache.backend='quanto' is not allowed: hqq in int8"),
        ({"axis_key": 1}, "int4", "cache.axis_key=1 is not allowed: 0 or -1 in quanto"),
        ({"axis_value": 1}, "int3", "cache.axis_value=1 is not allowed: 0 in int3"),
        ({"q_group_size": 32}, "fp8", "cache.q_group_size=32 is not allowed: None in fp8"),
        ({"q_group_size": 96}, "int4", "cache.q_group_size=96 does not divide a sequence's"),
        ({"backend": "hqq", "q_group_size": 96}, "int4", "which hqq needs"),
        (
            {"backend": "hqq", "axis_key": 1, "q_group_size": 2**20},
            "int4",
            "cache.axis_key=1 packs 2 codes in a word, which does not divide 1 rows",
        ),
    ],
)
def test_what_the_backends_refuse_is_refused_in_one_line(cache, kv_dtype, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        estimate_of(1024, cache=CacheSpec(kind="quantised", **cache), kv_dtype=kv_dtype)


def test_groups_have_to_come_out_even_at_every_flush():
    """quanto fails in the step that quantises anew, not before."""
    model = planner.read_config({**TINY["llama"], "num_key_value_heads": 1})
    deploy = Deployment(
        gpu="cpu",
        kv_dtype="int4",
        cache=CacheSpec(kind="quantised", q_group_size=64, residual_tokens=5),
    )
    fine = Inference(batch=1, prompt_tokens=8, output_tokens=5)
    assert planner.estimate(model, fine, deploy).memory.kv_cache_bytes
    with pytest.raises(ConfigError, match="at 13 tokens, which quanto needs"):
        planner.estimate(model, replace(fine, output_tokens=6), deploy)


def test_times_are_given_with_a_quantised_cache():
    """Dequantising the whole cache makes a step slower than reading it plain."""
    plain, packed = (estimate_of(16_384, 64, kv_dtype=d).latency for d in (None, "int4"))
    assert packed.tpot_s > plain.tpot_s
