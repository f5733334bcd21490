"""Training steps of every family that attnlab runs: exact to the byte."""

from __future__ import annotations

import pytest
import torch

import planner
from attnlab.lora import add_adapters
from attnlab.transformer import Transformer
from planner import ConfigError
from planner.activations import peak
from planner.layers import MLA, MoE
from planner.runtimes.attnlab_training.mixture import check_trained
from tests.attnlab.families import FAMILIES, PLANNED
from tests.pairs import every_pair
from tests.planner.steps import DTYPES, curve, events, program_of, square, watched_step

STRETCHED = ("dynamic", "yarn", "longrope")  # their tables have small temporaries of their own


UNSTRETCHED = ", plain rope"
"""Of a family whose tables are stretched: all that it allocates can be compared."""


def described(name):
    config = FAMILIES[name.removesuffix(UNSTRETCHED)]().to_dict()
    if name.endswith(UNSTRETCHED):
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    return planner.read_config(config)


FEW_TARGETS = ("o_proj",)  # a mixture's feed-forwards are no linear layers to peft
UNTRAINED = {
    "phimoe": "whose router is sparsemixer is not planned",
    "ernie4_5_moe": "whose correction is a parameter without a gradient is not planned",
    **{
        name: r"latent attention \(MLA\) is not planned"
        for name in PLANNED
        if any(isinstance(x.attention, MLA) for x in described(name).layers)
    },
}


@pytest.mark.parametrize("name", UNTRAINED)
def test_what_is_not_planned_is_refused(name):
    with pytest.raises(ConfigError, match=UNTRAINED[name]):
        check_trained(described(name), "bf16")


METHODS = {
    "whole, bf16": ("bf16", False, "pure"),
    "whole, fp32": ("fp32", False, "pure"),
    "whole, autocast": ("fp32", False, "autocast"),
    "adapters, pure": ("bf16", True, "pure"),
    "adapters, autocast": ("bf16", True, "autocast"),
}
"""Dtype of the weights, whether adapters are trained beside them, precision."""
CHECKPOINTING = {
    "none": {"checkpointing": "none"},
    "full": {"checkpointing": "full"},
    "every second": {"checkpointing": "full", "checkpoint_every": 2},
    "selective": {"checkpointing": "selective"},
}


@every_pair(
    name=[*(name for name in PLANNED if name not in UNTRAINED), f"gpt_oss{UNSTRETCHED}"],
    method=METHODS,
    checkpointing=CHECKPOINTING,
    attention=(None, "naive"),
    adapters=(None, "bf16"),
    shape=[(2, 17), (1, 1)],
)
def test_a_step_is_exact_in_every_family(name, method, checkpointing, attention, adapters, shape):
    """Every allocation, the peak and the gradients that are left."""
    (dtype, adapted, precision), how = METHODS[method], CHECKPOINTING[checkpointing]
    model, lora = described(name), None
    live = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    if adapted:
        mixture = any(isinstance(layer.feed_forward, MoE) for layer in model.layers)
        lora = planner.LoRA(
            rank=3,
            targets=FEW_TARGETS if mixture else "all-linear",
            dtype=adapters if precision == "pure" else None,
        )
        add_adapters(live, lora)
    meter, dims = watched_step(live, *shape, precision=precision, **how), square(*shape)
    what = how | {"autocast": "bf16" if precision == "autocast" else None}
    program = program_of(model, dims, attention=live.attention, dtype=dtype, lora=lora, **what)
    if getattr(model.positions, "rope_type", None) not in STRETCHED:
        assert curve(events(program, dims)) == curve(meter.events)
    highest = peak(program, dims)
    assert (highest.live_bytes, highest.kernel) == (meter.peak_bytes, meter.peak_op)
    gradients = sum(p.grad.nbytes for p in live.parameters() if p.grad is not None)
    assert sum(change for _, change in events(program, dims)) == meter.live_bytes == gradients


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_an_estimate_of_a_step_with_adamw_adds_up(name, method):
    """Of full training under autocast, and of adapters beside bfloat16 weights."""
    model, lora, autocast = described(name), None, method == "full"
    live = Transformer(model, dtype=DTYPES["fp32" if autocast else "bf16"], device="cpu")
    if method == "lora":
        lora = planner.LoRA(
            rank=3, targets=("q_proj", "o_proj") if name != "gpt2" else "all-linear"
        )
        add_adapters(live, lora)
    how = dict(
        checkpointing="full", checkpoint_every=2, precision="autocast" if autocast else "pure"
    )
    trained = [p for p in live.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(trained, foreach=True)
    watched_step(live, 2, 17, adamw, **how)  # makes the states
    meter = watched_step(live, 2, 17, adamw, **how)
    states = sum(value.nbytes for state in adamw.state.values() for value in state.values())
    work = planner.Training(batch=2, sequence_tokens=17, method=method, lora=lora, **how)
    deploy = planner.Deployment(
        gpu="cpu", runtime="attnlab", dtype="bf16", attention=live.attention
    )
    memory = planner.estimate(model, work, deploy).memory
    assert memory.weights_bytes == sum(p.nbytes for p in [*live.parameters(), *live.buffers()])
    assert memory.optimizer_bytes == states
    assert memory.gradients_bytes == sum(p.nbytes for p in trained)
    assert memory.peak_live_bytes == memory.weights_bytes + states + meter.peak_bytes
