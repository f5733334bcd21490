"""Models of real size, against transformers' own classes traced on fake tensors."""

from __future__ import annotations

import json

import pytest

import planner
from planner.loading import load_config
from profiles.module_trace import fake_ids, trace_module
from profiles.trace import _built

TOKENS = 4096
LOSS_BYTES = 4


def described(name, layers):
    """Its config, cut to so many layers where a number is given."""
    config = dict(load_config(name)[1])
    if layers is not None:
        config["num_hidden_layers"] = layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:layers]
    return config


def traced(config, *, checkpointed=False, **how):
    live = _built.__wrapped__(json.dumps(config), "bf16", False)
    if checkpointed:
        live.activation_checkpointing_enable()
    return trace_module(live, {"input_ids": fake_ids(1, TOKENS)}, **how).peak_live_bytes


def estimated(config, work):
    deploy = planner.Deployment(gpu="cpu", dtype="bf16")
    return planner.estimate(planner.load_model(config), work, deploy)


@pytest.mark.parametrize(
    ("name", "mib"),
    [("llama-3.1-8b", 16_862.5), ("gemma-2-9b", 22_999.2), ("mixtral-8x7b", 90_680.9)],
)
def test_a_prefill_of_4096_tokens_equals_its_trace(name, mib):
    config = described(name, None)
    memory = estimated(config, planner.Inference(batch=1, prompt_tokens=TOKENS)).memory
    assert memory.peak_live_bytes == traced(config)
    assert round(memory.peak_live_bytes / 2**20, 1) == mib


@pytest.mark.parametrize(
    ("name", "layers", "checkpointing"),
    [
        ("llama-3.1-8b", None, "full"),
        ("llama-3.1-8b", 3, "none"),
        ("gemma-2-9b", 4, "full"),
        ("gemma-2-9b", 2, "none"),
        ("mixtral-8x7b", 4, "full"),
        ("mixtral-8x7b", 2, "none"),
    ],
)
def test_a_step_with_adamw_equals_its_trace(name, layers, checkpointing):
    """The trace lets go of the loss before the optimizer's step, and counts no steps."""
    config = described(name, layers)
    work = planner.Training(batch=1, sequence_tokens=TOKENS, checkpointing=checkpointing)
    found = estimated(config, work)
    counts = sum(row.size_bytes for row in found.rows if "step counts" in row.item)
    loss = LOSS_BYTES if found.peak_phase == "optimizer step" else 0
    checkpointed = checkpointing == "full"
    seen = traced(config, checkpointed=checkpointed, train=True, optimizer="adamw")
    assert found.memory.peak_live_bytes - counts - loss == seen
