"""Closed-form peaks with a quantised cache against storages watched while transformers runs."""

from __future__ import annotations

import pytest
import torch

import planner
from planner import CacheSpec
from planner.activations import peak
from planner.program import Dims
from planner.runtimes.quantised_cache import quantised_cache
from planner.runtimes.transformers_program import Pass, forward_program
from tests.planner.configs import TINY, build
from tests.planner.quantised import (
    QuantisedMeter,
    live_quantised_cache,
    needs_hqq,
    unpack_in_python,
)

__all__ = ["unpack_in_python"]

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
CASES = [
    ("llama", "sdpa", "int2, along channels"),
    ("llama", "sdpa", "int4, no residual"),
    ("deepseek_v3", "eager", "int2, along channels"),
    ("gpt2", "sdpa", "int2, along channels"),
] + [
    (name, attention, setting)
    for name, attention in (
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("gpt2", "sdpa"),
        ("gpt2", "eager"),
        ("mistral full, wide heads", "eager"),
        ("deepseek_v3", "sdpa"),
        ("deepseek_v3", "eager"),
        ("gemma2 without sliding layers", "eager"),
    )
    for setting in ("int4", "fp8")
]


@pytest.mark.parametrize(("name", "attention", "setting"), CASES)
# few tokens: the feed-forward wins the peak; many: attention does
@pytest.mark.parametrize(
    ("computed", "batch", "tokens"), [("bf16", 2, 8), ("fp32", 1, 64), ("bf16", 2, 200)]
)
def test_peak_is_exact_at_prefill_and_over_decode_steps(
    unpack_in_python, name, attention, setting, computed, batch, tokens
):
    seen, ours = peaks(
        name, attention, SETTINGS[setting], setting.split(",")[0], computed, batch, tokens
    )
    assert ours == seen


@needs_hqq
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("dtype", ["int8", "int4", "int3", "int2", "int1"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("computed", "tokens"), [("bf16", 256), ("fp32", 64)])
def test_peak_with_hqq_is_exact_on_a_cpu(name, dtype, axis, computed, tokens):
    if dtype == "int3" and axis:
        pytest.skip("hqq cannot dequantise it")
    options = {"backend": "hqq", "q_group_size": 8, "residual_tokens": 4}
    options |= {"axis_key": axis, "axis_value": axis}
    seen, ours = peaks(name, "sdpa", options, dtype, computed, 2, tokens)
    assert ours == seen


def peaks(name, attention, options, dtype, computed, batch, tokens):
    """Peaks of a prefill and four decode steps: watched, and ours."""
    live = build(TINY[name], device="cpu", dtype=DTYPES[computed], attention=attention)
    ids = torch.randint(1, 99, (batch, tokens))
    cache = live_quantised_cache(live.config, dtype, **options)
    described = quantised_cache(CacheSpec(kind="quantised", **options), dtype)
    model = planner.read_config(TINY[name])
    seen, ours = [], []
    with torch.no_grad(), QuantisedMeter() as meter:
        for step in range(5):
            meter.reset_peak()
            out = live(ids if step == 0 else ids[:, :1], past_key_values=cache, use_cache=True)
            seen.append(meter.peak_bytes)
            del out
            program = forward_program(
                model,
                Pass(
                    kind="decode" if step else "prefill",
                    attention=attention,
                    dtype=computed,
                    kv_dtype=dtype,
                    logits="all",
                    equal_widths_only=True,
                    quantised=described,
                    residual_tokens=max(0, step - 1) % max(1, described.form.residual_tokens),
                ),
            )
            dims = Dims(batch=batch, tokens=1 if step else tokens, context=tokens + step)
            ours.append(peak(program, dims).live_bytes)
    return seen, ours
