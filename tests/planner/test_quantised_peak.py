"""Closed-form peaks with a quantised cache against storages watched while transformers runs."""

from __future__ import annotations

import pytest
import torch

import planner
from planner import CacheSpec
from planner.activations import peak
from planner.program import Dims
from planner.runtimes.quantised_cache import quantised_format
from planner.runtimes.transformers_program import Pass, forward_program
from tests.planner.configs import TINY, build
from tests.planner.quantised import QuantisedMeter, quantised_cache, unpack_in_python

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
    options, dtype = SETTINGS[setting], setting.split(",")[0]
    live = build(TINY[name], device="cpu", dtype=DTYPES[computed], attention=attention)
    ids = torch.randint(1, 99, (batch, tokens))
    cache = quantised_cache(live.config, dtype, **options)
    form = quantised_format(CacheSpec(kind="quantised", **options), dtype)
    model = planner.read_config(TINY[name])
    with torch.no_grad(), QuantisedMeter() as meter:
        for step in range(5):
            meter.reset_peak()
            out = live(ids if step == 0 else ids[:, :1], past_key_values=cache, use_cache=True)
            measured = meter.peak_bytes
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
                    quantised=form,
                    residual_tokens=max(0, step - 1) % max(1, form.residual_tokens),
                ),
            )
            dims = Dims(batch=batch, tokens=1 if step else tokens, context=tokens + step)
            assert peak(program, dims).live_bytes == measured, step
