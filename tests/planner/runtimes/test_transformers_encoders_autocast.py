"""Steps of BERT and T5 inside torch.autocast, to bf16 and to fp16: peaks to the byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner.runtimes.transformers_code import regime
from planner.runtimes.transformers_code.forward import pass_program
from profiles.meters import module_bytes
from tests.planner.runtimes.test_transformers_autocast import GpuList
from tests.planner.runtimes.test_transformers_encoders import BERT, T5
from tests.planner.runtimes.test_transformers_scaled import warm_scaler
from tests.planner.small_decoders import CHECKPOINTING, TORCH_DTYPES, checkpoint, described
from tests.planner.small_encoders import berts, built, step_meter, t5s
from tests.properties import examples

SIZES = st.integers(1, 30)
ATTENTIONS = st.sampled_from(("eager", "sdpa"))
LOW = st.sampled_from(("bf16", "fp16"))


def check_exact(config, attention, low, sizes, how, listed=None):
    batch, encoded, tokens = sizes
    live = built(described(config), "fp32", attention).train()
    checkpoint(live, how)
    scaler = warm_scaler() if low == "fp16" else None
    meter = step_meter(live, *sizes, low=TORCH_DTYPES[low], scaler=scaler, listed=listed)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        encoder_tokens=encoded if config["model_type"] == "t5" else None,
        optimizer=None,
        checkpointing=how[0],
        checkpoint_every=how[1],
        precision="autocast",
    )
    deploy = planner.Deployment(gpu="cpu", dtype=low, attention=attention)
    memory = planner.estimate(planner.load_model(config), work, deploy).memory
    assert memory.weights_bytes == module_bytes(live)
    held = memory.weights_bytes + memory.optimizer_bytes
    assert memory.peak_live_bytes - held == meter.peak_bytes


@examples(15, fuzz=30, deadline=None)
@given(
    config=berts(headed=True),
    attention=ATTENTIONS,
    low=LOW,
    batch=st.integers(1, 3),
    tokens=SIZES,
    how=CHECKPOINTING,
)
def test_a_step_of_bert_is_exact(config, attention, low, batch, tokens, how):
    check_exact(config, attention, low, (batch, tokens, tokens), how)


@examples(20, fuzz=40, deadline=None)
@given(
    config=t5s(),
    attention=ATTENTIONS,
    low=LOW,
    batch=st.integers(1, 3),
    encoded=SIZES,
    tokens=SIZES,
    how=CHECKPOINTING,
)
def test_a_step_of_t5_is_exact(config, attention, low, batch, encoded, tokens, how):
    check_exact(config, attention, low, (batch, encoded, tokens), how)


@examples(15, fuzz=30, deadline=None)
@given(
    config=berts(headed=True) | t5s(),
    attention=ATTENTIONS,
    batch=st.integers(1, 2),
    tokens=SIZES,
    how=CHECKPOINTING.filter(lambda how: how[0] == "none"),
)
def test_the_long_list_of_a_gpu_is_exact_too(config, attention, batch, tokens, how):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(regime, "widens", lambda device: True)
        pass_program.cache_clear()
        check_exact(config, attention, "bf16", (batch, tokens, tokens), how, GpuList())
    pass_program.cache_clear()


@pytest.mark.parametrize("impl", ["foreach", "fused", "for-loop"])
@pytest.mark.parametrize("low", ["bf16", "fp16"])
@pytest.mark.parametrize("config", [T5 | {"vocab_size": 50, "d_model": 16, "d_ff": 24}, BERT])
def test_a_step_with_adamw_adds_up(config, low, impl):
    live = built(described(config), "fp32", "sdpa").train()
    ways = {"foreach": impl == "foreach", "fused": impl == "fused"}
    adamw = torch.optim.AdamW(live.parameters(), **ways)
    how = {"low": TORCH_DTYPES[low], "scaler": warm_scaler() if low == "fp16" else None}
    step_meter(live, 2, 30, 30, adamw, **how)  # makes the states
    meter = step_meter(live, 2, 30, 30, adamw, **how)
    states = sum(value.nbytes for state in adamw.state.values() for value in state.values())
    work = planner.Training(batch=2, sequence_tokens=30, optimizer_impl=impl, precision="autocast")
    deploy = planner.Deployment(gpu="cpu", dtype=low)
    memory = planner.estimate(planner.load_model(config), work, deploy).memory
    assert memory.optimizer_bytes == states + (8 if low == "fp16" else 0)
    held = memory.weights_bytes + memory.optimizer_bytes
    assert memory.peak_live_bytes - held == meter.peak_bytes


@pytest.mark.parametrize("config", [T5, BERT])
def test_an_allocator_plays_a_step_on_a_gpu(config):
    work = planner.Training(batch=2, sequence_tokens=40, precision="autocast")
    memory = planner.estimate(
        planner.load_model(config), work, planner.Deployment(gpu="h200")
    ).memory
    assert memory.peak_live_bytes < memory.peak_allocated_bytes <= memory.peak_reserved_bytes
