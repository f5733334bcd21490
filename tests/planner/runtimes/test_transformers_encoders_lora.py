"""LoRA and DoRA of peft in BERT and T5: peaks to the byte, over random small configs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from profiles.meters import LiveTensorMeter, module_bytes, storage_bytes
from tests.planner.runtimes.test_transformers_encoders import BERT, T5
from tests.planner.runtimes.test_transformers_lora import with_adapters
from tests.planner.small_decoders import CHECKPOINTING, checkpoint, described, words
from tests.planner.small_encoders import berts, built, t5s
from tests.properties import examples

NAMES = {"bert": ("query", "key", "value", "dense"), "t5": ("q", "k", "v", "o", "wo")}
TASKS = {"bert": None, "t5": "SEQ_2_SEQ_LM"}
SMALL_T5 = T5 | {"vocab_size": 50, "d_model": 16, "d_ff": 24}


@st.composite
def adapted(draw):
    """A config, and adapters beside all or some of its linear layers, by the class's names."""
    config = draw(berts(headed=True) | t5s())
    some = st.lists(st.sampled_from(NAMES[config["model_type"]]), min_size=1, unique=True)
    targets = draw(st.just("all-linear") | some.map(tuple))
    dtype = draw(st.none() | st.just("bf16"))
    return config, planner.LoRA(
        rank=draw(st.integers(1, 9)), targets=targets, dtype=dtype, dora=draw(st.booleans())
    )


def peft_model(config, lora, dtype, attention, how):
    live = built(described(config), dtype, attention)
    checkpoint(live, how)
    return with_adapters(live, lora, TASKS[config["model_type"]])


def step(live, read, labels, optimizer=None, *, low=None):
    more = {"use_cache": False} if live.config.is_encoder_decoder else {}
    with torch.autocast("cpu", dtype=low, enabled=low is not None):
        loss = live(input_ids=read, labels=labels, **more).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def memory_of(config, lora, dtype, attention, **what):
    work = planner.Training(method="lora", lora=lora, **what)
    deploy = planner.Deployment(gpu="cpu", dtype=dtype, attention=attention)
    return planner.estimate(planner.load_model(config), work, deploy).memory


@examples(30, fuzz=60, deadline=None)
@given(
    adapted=adapted(),
    dtype=st.sampled_from(("bf16", "fp32", "autocast")),
    attention=st.sampled_from(("eager", "sdpa")),
    batch=st.integers(1, 3),
    encoded=st.integers(1, 30),
    tokens=st.integers(1, 30),
    how=CHECKPOINTING,
)
def test_the_peak_of_a_step_is_exact(adapted, dtype, attention, batch, encoded, tokens, how):
    """In one dtype, or frozen weights in bf16 inside autocast; adapters in fp32, or in bf16."""
    config, lora = adapted
    casts = dtype == "autocast"
    if dtype != "bf16":
        lora = replace(lora, dtype=None)
    held = "bf16" if casts else dtype
    reads = config["model_type"] == "t5"
    encoded = encoded if reads else tokens
    live = peft_model(config, lora, held, attention, how)
    read, labels = words(live.config, batch, encoded), words(live.config, batch, tokens)
    with LiveTensorMeter() as meter:
        step(live, read, labels, low=torch.bfloat16 if casts else None)
    memory = memory_of(
        config,
        lora,
        held,
        attention,
        batch=batch,
        sequence_tokens=tokens,
        encoder_tokens=encoded if reads else None,
        optimizer=None,
        precision="autocast" if casts else "pure",
        checkpointing=how[0],
        checkpoint_every=how[1],
    )
    assert memory.weights_bytes == module_bytes(live)
    assert memory.peak_live_bytes - memory.weights_bytes == meter.peak_bytes


@pytest.mark.parametrize("impl", ["foreach", "fused", "for-loop"])
@pytest.mark.parametrize("config", [SMALL_T5, BERT])
def test_a_step_with_adamw_adds_up(config, impl):
    lora = planner.LoRA(rank=3)
    live = peft_model(config, lora, "bf16", "sdpa", ("none", 1))
    ways = {"foreach": impl == "foreach", "fused": impl == "fused"}
    adamw = torch.optim.AdamW([p for p in live.parameters() if p.requires_grad], **ways)
    ids = words(live.config, 2, 30)
    step(live, ids, ids, adamw)  # makes the states
    with LiveTensorMeter() as meter:
        step(live, ids, ids, adamw)
    what = {"batch": 2, "sequence_tokens": 30, "optimizer_impl": impl}
    memory = memory_of(config, lora, "bf16", "sdpa", **what)
    states = (t for kept in adamw.state.values() for t in kept.values())
    assert memory.optimizer_bytes == storage_bytes(states)
    held = memory.weights_bytes + memory.optimizer_bytes
    assert memory.peak_live_bytes - held == meter.peak_bytes


@pytest.mark.parametrize("config", [SMALL_T5, BERT])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_what_layers_share_is_freed_once(config, checkpointing):
    """An allocator, which refuses to free what is not there, plays it."""
    work = planner.Training(batch=2, sequence_tokens=30, method="lora", checkpointing=checkpointing)
    deploy = planner.Deployment(gpu="h200", dtype="bf16")
    assert planner.estimate(planner.load_model(config), work, deploy).memory.peak_reserved_bytes


def test_a_word_of_another_family_is_refused():
    work = planner.Training(
        batch=1, sequence_tokens=8, method="lora", lora=planner.LoRA(targets=("c_attn",))
    )
    with pytest.raises(ConfigError, match=r"'c_attn' is no linear layer of bert .* dense"):
        planner.estimate(planner.load_model(BERT), work, planner.Deployment(gpu="cpu"))
