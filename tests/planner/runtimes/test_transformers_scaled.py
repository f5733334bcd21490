"""Steps in float16 autocast with a GradScaler: peaks to the byte, over random small decoders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import planner
from profiles.meters import LiveTensorMeter, module_bytes, storage_bytes
from tests.attnlab.families import FAMILIES
from tests.planner.runtimes.test_transformers_lora import adapted_decoders, with_adapters
from tests.planner.small_decoders import (
    CHECKPOINTING,
    EAGER_ONLY,
    built,
    checkpoint,
    decoders,
    described,
    padding,
    takes_padding,
    words,
)
from tests.planner.trained.test_optimizers import EVERY_WAY, Together, real
from tests.properties import examples


def warm_scaler():
    """Its tensors are made; no gradient overflows, or the optimizer's step would be skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.zeros(()))
    return scaler


def step(live, ids, scaler, optimizer=None, *, mask=None, times=1):
    """As torch's documentation and accelerate have it, `times` batches behind each other."""
    for last in range(times - 1, -1, -1):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = live(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
        scaler.scale(loss).backward()
        if last:
            del loss
    if optimizer is not None:
        for one in getattr(optimizer, "optimizers", (optimizer,)):
            scaler.step(one)
        scaler.update()
        live.zero_grad(set_to_none=True)


def memory_of(live, work, attention):
    model = planner.read_config(live.config.to_dict())
    deploy = planner.Deployment(gpu="cpu", dtype="fp16", attention=attention)
    return planner.estimate(model, work, deploy).memory


@examples(30, fuzz=60, deadline=None)
@given(
    config=decoders(),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 30),
    eager=st.booleans(),
    how=CHECKPOINTING,
    padded=st.booleans(),
    times=st.integers(1, 2),
)
def test_the_peak_of_a_step_is_exact(config, batch, tokens, eager, how, padded, times):
    padded = padded and takes_padding(config)
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), "fp32", attention).train()
    checkpoint(live, how)
    mask, ids = padding(batch, tokens) if padded else None, words(live.config, batch, tokens)
    with LiveTensorMeter() as meter:
        step(live, ids, warm_scaler(), mask=mask, times=times)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer=None,
        precision="autocast",
        checkpointing=how[0],
        checkpoint_every=how[1],
        padded=padded,
        accumulation_steps=times,
    )
    memory = memory_of(live, work, attention)
    assert memory.weights_bytes == module_bytes(live)
    assert memory.peak_live_bytes - memory.weights_bytes == meter.peak_bytes


@examples(20, fuzz=40, deadline=None)
@given(
    adapted=adapted_decoders(),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 20),
    eager=st.booleans(),
    how=CHECKPOINTING,
)
def test_the_peak_of_a_step_with_adapters_is_exact(adapted, batch, tokens, eager, how):
    """Frozen weights in fp16, adapters in fp32: what Trainer(fp16=True) makes of peft's models."""
    config, lora = adapted
    assume(how[0] != "selective" or config.get("clip_qkv") is None)  # refused
    lora = replace(lora, dtype=None)
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), "fp16", attention)
    checkpoint(live, how)
    live = with_adapters(live, lora)
    ids = words(live.config, batch, tokens)
    with LiveTensorMeter() as meter:
        step(live, ids, warm_scaler())
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer=None,
        method="lora",
        lora=lora,
        precision="autocast",
        checkpointing=how[0],
        checkpoint_every=how[1],
    )
    memory = memory_of(live, work, attention)
    assert memory.weights_bytes == module_bytes(live)
    assert memory.peak_live_bytes - memory.weights_bytes == meter.peak_bytes


@pytest.mark.parametrize(("optimizer", "impl"), EVERY_WAY)
@pytest.mark.parametrize("name", ["gemma2", "gpt2"])
def test_a_step_with_each_optimizer_adds_up(name, optimizer, impl):
    config = described(FAMILIES[name]().to_dict())
    attention = "eager" if name in EAGER_ONLY else "sdpa"
    live = built(config, "fp32", attention).train()
    stepping, ids = real(optimizer, impl, live), words(live.config, 1, 2)
    with LiveTensorMeter() as meter:
        scaler = warm_scaler()
        step(live, ids, scaler, stepping)  # makes the states
        before = meter.live_bytes
        meter.reset_peak()
        step(live, ids, scaler, stepping)
    tensors = (t for kept in stepping.state.values() for t in kept.values())
    states = storage_bytes(t for t in tensors if isinstance(t, torch.Tensor))
    assert (states > 0) == (optimizer != "sgd")  # the step was not skipped
    work = planner.Training(
        batch=1,
        sequence_tokens=2,
        precision="autocast",
        optimizer=optimizer,
        optimizer_impl=impl,
    )
    memory = memory_of(live, work, attention)
    scale, tracker = scaler._scale, scaler._growth_tracker
    assert memory.optimizer_bytes == states + storage_bytes((scale, tracker))
    held = memory.weights_bytes + memory.optimizer_bytes
    assert memory.peak_live_bytes - held == meter.peak_bytes - before
    assert isinstance(stepping, Together) == (optimizer == "muon")


def test_an_allocator_plays_a_scaled_step():
    work = planner.Training(batch=1, sequence_tokens=64, precision="autocast")
    deploy = planner.Deployment(gpu="h200", dtype="fp16")
    memory = planner.estimate(planner.load_model("llama-3.2-1b"), work, deploy).memory
    live = memory.peak_live_bytes
    assert live < memory.peak_allocated_bytes < 1.02 * live + 80 * 2**20


@pytest.mark.parametrize(("dtype", "kept"), [("fp16", "bf16"), ("fp16", "fp16"), ("bf16", "fp16")])
def test_adapters_whose_gradients_are_of_16_bits_are_refused(dtype, kept):
    work = planner.Training(
        batch=1,
        sequence_tokens=8,
        method="lora",
        lora=planner.LoRA(dtype=kept),
        precision="autocast",
    )
    deploy = planner.Deployment(gpu="cpu", dtype=dtype)
    with pytest.raises(planner.ConfigError, match=f"lora.dtype='{kept}' inside autocast to"):
        planner.estimate(planner.load_model("llama-3.2-1b"), work, deploy)
