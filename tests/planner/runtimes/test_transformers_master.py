"""Master weights: steps on float32 copies, peaks to the byte, over random small decoders.

The loop here is the oracle: Megatron-LM's order of events in plain torch.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

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
    words,
)
from tests.planner.small_encoders import berts, t5s
from tests.planner.small_encoders import built as built_encoder
from tests.planner.trained.test_optimizers import EVERY_WAY, real
from tests.properties import examples


class Master:
    """An optimizer of float32 copies of what is trained."""

    def __init__(self, live, optimizer, impl, dtype):
        self.copies = {p: p.detach().float() for p in live.parameters() if p.requires_grad}
        named = [(n, self.copies[p]) for n, p in live.named_parameters() if p in self.copies]
        stands_in = SimpleNamespace(
            parameters=self.copies.values, named_parameters=lambda: iter(named)
        )
        self.optimizer = real(optimizer, impl, stands_in)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, enabled=dtype == "fp16")

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self):
        for p, copy in self.copies.items():
            if p.grad is not None:  # a bias of an untied BERT has none
                copy.grad = p.grad.float()
            p.grad = None
        for one in getattr(self.optimizer, "optimizers", (self.optimizer,)):
            self.scaler.step(one)
        self.scaler.update()
        with torch.no_grad():
            for p, copy in self.copies.items():
                p.copy_(copy)
        for copy in self.copies.values():
            copy.grad = None

    def storages(self):
        states = (t for kept in self.optimizer.state.values() for t in kept.values())
        scale = (self.scaler._scale, self.scaler._growth_tracker) if self.scaler._enabled else ()
        held = (*self.copies.values(), *states, *scale)
        return storage_bytes(t for t in held if isinstance(t, torch.Tensor))


def check_exact(live, model, work, dtype, attention):
    """The second step, of which only what is trained is left."""
    ids = words(live.config, work.batch, work.sequence_tokens)
    more = {} if live.config.model_type == "bert" else {"use_cache": False}
    with LiveTensorMeter() as meter:
        master = Master(live, work.optimizer, work.optimizer_impl, dtype)
        for _ in ("states", "step"):
            before = meter.live_bytes
            meter.reset_peak()
            for last in range(work.accumulation_steps - 1, -1, -1):
                loss = live(input_ids=ids, labels=ids, **more).loss
                master.backward(loss)
                if last:
                    del loss
            master.step()
            del loss
    deploy = planner.Deployment(gpu="cpu", dtype=dtype, attention=attention)
    memory = planner.estimate(model, work, deploy).memory
    assert memory.weights_bytes == module_bytes(live)
    assert memory.optimizer_bytes == master.storages()
    held = memory.weights_bytes + memory.optimizer_bytes
    assert memory.peak_live_bytes - held == meter.peak_bytes - before


@examples(25, fuzz=50, deadline=None)
@given(
    config=decoders(),
    dtype=st.sampled_from(("bf16", "fp16")),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 30),
    eager=st.booleans(),
    how=CHECKPOINTING,
    way=st.sampled_from(EVERY_WAY),
    times=st.integers(1, 2),
)
def test_a_step_adds_up(config, dtype, batch, tokens, eager, how, way, times):
    attention = "eager" if eager or config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), dtype, attention).train()
    checkpoint(live, how)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer=way[0],
        optimizer_impl=way[1],
        precision="master",
        checkpointing=how[0],
        checkpoint_every=how[1],
        accumulation_steps=times,
    )
    check_exact(live, planner.read_config(live.config.to_dict()), work, dtype, attention)


@pytest.mark.parametrize(("optimizer", "impl"), EVERY_WAY)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_each_optimizer_steps_copies(name, optimizer, impl):
    live = built(described(FAMILIES[name]().to_dict()), "bf16", "sdpa").train()
    work = planner.Training(
        batch=1, sequence_tokens=2, precision="master", optimizer=optimizer, optimizer_impl=impl
    )
    check_exact(live, planner.read_config(live.config.to_dict()), work, "bf16", "sdpa")


@examples(12, fuzz=25, deadline=None)
@given(
    config=berts(headed=True) | t5s(),
    batch=st.integers(1, 3),
    tokens=st.integers(1, 30),
    attention=st.sampled_from(("eager", "sdpa")),
    how=CHECKPOINTING,
    way=st.sampled_from([way for way in EVERY_WAY if way[0] != "muon"]),
)
def test_a_step_of_bert_and_t5_adds_up(config, batch, tokens, attention, how, way):
    live = built_encoder(described(config), "bf16", attention).train()
    checkpoint(live, how)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer=way[0],
        optimizer_impl=way[1],
        precision="master",
        checkpointing=how[0],
        checkpoint_every=how[1],
    )
    check_exact(live, planner.load_model(config), work, "bf16", attention)


@examples(12, fuzz=25, deadline=None)
@given(
    adapted=adapted_decoders(),
    batch=st.integers(1, 2),
    tokens=st.integers(1, 20),
    impl=st.sampled_from(("foreach", "fused", "for-loop")),
    how=CHECKPOINTING,
)
def test_adapters_of_16_bits_have_copies_too(adapted, batch, tokens, impl, how):
    config, lora = adapted
    assume(how[0] != "selective" or config.get("clip_qkv") is None)  # refused
    lora = replace(lora, dtype="bf16")
    attention = "eager" if config["model_type"] in EAGER_ONLY else "sdpa"
    live = built(described(config), "bf16", attention)
    checkpoint(live, how)
    live = with_adapters(live, lora)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer_impl=impl,
        method="lora",
        lora=lora,
        precision="master",
        checkpointing=how[0],
        checkpoint_every=how[1],
    )
    check_exact(live, planner.read_config(live.config.to_dict()), work, "bf16", attention)


def test_eighteen_bytes_a_parameter():
    """Megatron Core, developer guide, distributed optimizer: float16 param, fp32 grads, 18.

    Gradients of 16 bits besides (its first row, 20) have made room for those of float32 here.
    """
    model = planner.load_model("llama-3.1-8b")
    work = planner.Training(batch=1, sequence_tokens=8, precision="master")
    memory = planner.estimate(model, work, planner.Deployment(gpu="h200")).memory
    held = memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes
    assert held / model.parameter_count == pytest.approx(18, rel=1e-6)


def test_an_allocator_plays_steps_on_copies():
    work = planner.Training(batch=1, sequence_tokens=64, precision="master")
    memory = planner.estimate(
        planner.load_model("llama-3.2-1b"), work, planner.Deployment(gpu="h200")
    ).memory
    live = memory.peak_live_bytes
    assert live < memory.peak_allocated_bytes < 1.02 * live + 80 * 2**20


@pytest.mark.parametrize(
    ("precision", "dtype", "optimizer", "known"),
    [
        ("master", "bf16", "adamw", True),
        ("autocast", "fp16", "adamw", True),
        ("pure", "bf16", "adamw-8bit", False),
    ],
)
def test_the_time_of_what_was_never_measured_has_no_range(precision, dtype, optimizer, known):
    work = planner.Training(batch=1, sequence_tokens=64, precision=precision, optimizer=optimizer)
    deploy = planner.Deployment(gpu="h200", dtype=dtype)
    latency = planner.estimate(planner.load_model("llama-3.2-1b"), work, deploy).latency
    assert latency.step_s > 0
    assert (latency.step_interval_s is not None) == known


@pytest.mark.parametrize(
    ("given", "dtype", "said"),
    [
        ({}, "fp32", "precision='master' in dtype='fp32' is not allowed: bf16 or fp16"),
        ({"method": "lora"}, "bf16", "lora.dtype=None with precision='master' is not planned: bf"),
        (
            {"method": "lora", "lora": planner.LoRA(dtype="fp16")},
            "bf16",
            "lora.dtype='fp16' with precision='master' is not planned: bf16",
        ),
    ],
)
def test_what_needs_no_copies_is_refused(given, dtype, said):
    work = planner.Training(batch=1, sequence_tokens=8, precision="master", **given)
    deploy = planner.Deployment(gpu="cpu", dtype=dtype)
    with pytest.raises(planner.ConfigError, match=said):
        planner.estimate(planner.load_model("llama-3.2-1b"), work, deploy)
