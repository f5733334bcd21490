"""Inference of transformers' classes: peaks to the byte, over random small configs."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from planner.activations import peak
from planner.program import Dims
from planner.runtimes.transformers import EXACT_PEAKS
from planner.runtimes.transformers_code.families import HELD
from planner.runtimes.transformers_code.forward import pass_program
from planner.runtimes.transformers_code.regime import Pass, Regime
from tests.planner.small_decoders import (
    DTYPES,
    EAGER_ONLY,
    KINDS,
    built,
    decoders,
    described,
    inference_peaks,
)
from tests.planner.small_encoders import HEADS


def predicted(model, batch, tokens, step, **what):
    dims = Dims(batch=batch, tokens=1 if step else tokens, context=tokens + step)
    kind = "decode" if step else "prefill"
    done = Pass(kind=kind, device="cpu", held_whole=step == 1, **what)
    return peak(pass_program(model, done, Regime.of(model, dims)), dims).live_bytes


@settings(max_examples=150, deadline=None)
@given(
    config=decoders(),
    dtype=st.sampled_from(tuple(DTYPES)),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 45),
    eager=st.booleans(),
    logits=st.sampled_from(("all", "last")),
)
def test_prefill_and_decode_steps_are_exact(config, dtype, batch, tokens, eager, logits):
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), dtype, attention).eval()
    seen = inference_peaks(live, batch, tokens, steps=3, last=logits == "last")
    model = planner.read_config(live.config.to_dict())
    what = {"attention": attention, "dtype": dtype, "logits": logits}
    assert [predicted(model, batch, tokens, step, **what) for step in range(4)] == seen


def test_every_type_that_is_called_exact_is_drawn():
    assert {*KINDS, *HEADS} == HELD
    assert {"deepseek_v3"} == EXACT_PEAKS - HELD, "which test_peak.py runs"


@pytest.mark.parametrize(
    ("config", "dtype", "attention", "without_cache", "with_cache"),
    [
        ("llama", "fp32", "eager", 4_375_552, 4_899_840),
        ("llama", "bf16", "sdpa", 1_598_464, 1_860_608),
        ("mixtral", "fp32", "sdpa", 5_827_648, 6_351_936),
        ("gpt2", "bf16", "eager", 3_408_896, 4_457_472),
    ],
)
def test_a_prefill_holds_what_others_measured(config, dtype, attention, without_cache, with_cache):
    """Prefills 2 × 128 on a CPU, measured apart from this project, beside its own cache bytes."""
    from tests.planner import test_transformers_training as training

    described = {"llama": training.LLAMA, "mixtral": training.MIXTRAL, "gpt2": training.GPT2}
    model = planner.read_config(described[config].to_dict())
    found = predicted(model, 2, 128, 0, attention=attention, dtype=dtype)
    assert found == pytest.approx(with_cache, rel=0.002)
    assert with_cache > without_cache
