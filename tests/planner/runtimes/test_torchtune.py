"""torchtune's steps: every allocation as its ops make them, eager."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import planner
from planner import ConfigError
from planner.layers import GQA, Dense, Layer, Norm, RoPE
from planner.training import as_built, training_phase
from profiles.meters import module_bytes
from tests.planner.steps import curve, events
from tests.planner.torchtune_steps import Decoder, watched_step

VOCAB, INNER, LAYERS = 24, 56, 4


def described(heads, *, tied):
    """The same model, by Hugging Face's names."""
    H, G, D = heads
    layer = Layer(
        attention=GQA(num_attention_heads=H, num_key_value_heads=G, head_dim=D, scaling=1.0),
        feed_forward=Dense(intermediate_size=INNER, activation="silu", gated=True),
        norm=Norm(kind="rmsnorm", eps=1e-6),
    )
    return replace(
        planner.load_model("llama-2-7b"),
        hidden_size=H * D,
        layers=(layer,) * LAYERS,
        vocab_size=VOCAB,
        positions=RoPE(rope_theta=1e4, rotary_dim=D),
        tie_word_embeddings=tied,
        max_position_embeddings=64,
        dtype="bf16",
    )


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize(
    ("heads", "tied", "batch", "chunks"),
    [((4, 2, 8), True, 1, 0), ((4, 4, 8), False, 2, 0), ((4, 1, 8), True, 2, 4)],
)
def test_every_allocation_of_a_step_is_that_of_its_ops(
    heads, tied, batch, chunks, rank, checkpointing
):
    tokens = 40
    torch.set_default_dtype(torch.bfloat16)
    live = Decoder(
        heads,
        inner=INNER,
        layers=LAYERS,
        vocab=VOCAB,
        tokens=64,
        rank=rank,
        tied=tied,
        chunks=chunks,
        checkpointed=checkpointing == "full",
    )
    torch.set_default_dtype(torch.float32)
    meter = watched_step(live, VOCAB, batch, tokens)
    work = planner.Training(
        batch=batch,
        sequence_tokens=tokens,
        optimizer=None,
        method="full" if rank is None else "lora",
        lora=None if rank is None else planner.LoRA(rank=rank),
        checkpointing=checkpointing,
        loss_chunk_tokens=tokens // chunks if chunks else None,
    )
    deploy = planner.Deployment(gpu="cpu", runtime="torchtune", dtype="bf16")
    e = planner.estimate(described(heads, tied=tied), work, deploy)
    assert e.memory.weights_bytes == module_bytes(live)
    assert e.memory.peak_live_bytes - e.memory.weights_bytes == meter.peak_bytes
    model, work = as_built(e.model, work, deploy)
    phase = training_phase(model, work, deploy, e.setting)
    ours = [live for _, live in curve(events(phase.program, phase.dims))]
    assert ours == [live for _, live in curve(meter.events)]


@pytest.mark.parametrize(
    ("model", "how", "why"),
    [
        ("gemma-2b", {}, "model_type=gemma is not planned for runtime=torchtune"),
        ("llama-2-7b", {"method": "adapter"}, "method='adapter' is not planned"),
        ("llama-2-7b", {"checkpointing": "selective"}, "checkpointing='selective' is not planned"),
        ("llama-2-7b", {"precision": "autocast"}, "precision='autocast' is not planned"),
    ],
)
def test_what_it_does_not_plan_is_refused_in_a_line(model, how, why):
    work = planner.Training(**{"batch": 1, "sequence_tokens": 64, **how})
    deploy = planner.Deployment(gpu="a100-80gb", runtime="torchtune", dtype="bf16")
    with pytest.raises(ConfigError, match=why) as refused:
        planner.estimate(planner.load_model(model), work, deploy)
    assert "\n" not in str(refused.value)


def test_inference_is_refused_in_a_line():
    work = planner.Inference(batch=1, prompt_tokens=64)
    deploy = planner.Deployment(gpu="a100-80gb", runtime="torchtune")
    with pytest.raises(ConfigError, match="runtime=torchtune plans training alone"):
        planner.estimate(planner.load_model("llama-2-7b"), work, deploy)
