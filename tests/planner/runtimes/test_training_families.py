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
from tests.planner.steps import DTYPES, curve, events, program_of, square, watched_step

STRETCHED = ("dynamic", "yarn", "longrope")  # their tables have small temporaries of their own


def described(name):
    return planner.read_config(FAMILIES[name]().to_dict())


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


@pytest.mark.parametrize("name", [name for name in PLANNED if name not in UNTRAINED])
@pytest.mark.parametrize(
    ("attention", "dtype", "batch", "tokens", "checkpointing"),
    [
        (None, "bf16", 2, 17, "none"),
        ("naive", "fp32", 2, 17, "full"),
        ("naive", "bf16", 1, 1, "none"),
        (None, "fp32", 2, 17, "every second"),
        (None, "bf16", 2, 17, "selective"),
        ("naive", "bf16", 2, 9, "selective"),
    ],
)
def test_a_step_is_exact_in_every_family(name, attention, dtype, batch, tokens, checkpointing):
    model = described(name)
    live = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    how = {"checkpointing": checkpointing}
    if checkpointing == "every second":
        how = {"checkpointing": "full", "checkpoint_every": 2}
    meter, dims = watched_step(live, batch, tokens, **how), square(batch, tokens)
    program = program_of(model, dims, attention=live.attention, dtype=dtype, **how)
    if getattr(model.positions, "rope_type", None) not in STRETCHED:
        assert curve(events(program, dims)) == curve(meter.events)
    highest = peak(program, dims)
    assert (highest.live_bytes, highest.kernel) == (meter.peak_bytes, meter.peak_op)
    gradients = sum(p.grad.nbytes for p in live.parameters())
    assert sum(change for _, change in events(program, dims)) == meter.live_bytes == gradients


FEW_TARGETS = ("o_proj",)  # a mixture's feed-forwards are no linear layers to peft


@pytest.mark.parametrize("name", [name for name in PLANNED if name not in UNTRAINED])
@pytest.mark.parametrize(
    ("attention", "dtype", "adapters", "how"),
    [
        (None, "bf16", None, {}),
        ("naive", "bf16", "bf16", {"checkpointing": "full", "checkpoint_every": 2}),
        (None, "fp32", None, {"checkpointing": "selective"}),
        (None, "bf16", None, {"precision": "autocast", "checkpointing": "full"}),
    ],
)
def test_a_step_with_adapters_is_exact_in_every_family(name, attention, dtype, adapters, how):
    model = described(name)
    mixture = any(isinstance(layer.feed_forward, MoE) for layer in model.layers)
    targets = FEW_TARGETS if mixture else "all-linear"
    lora = planner.LoRA(rank=3, targets=targets, dtype=adapters)
    live = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    add_adapters(live, lora)
    check_exact(live, dtype, how, lora=lora)


@pytest.mark.parametrize("name", [name for name in PLANNED if name not in UNTRAINED])
@pytest.mark.parametrize(
    ("attention", "how"),
    [
        (None, {}),
        ("naive", {}),
        (None, {"checkpointing": "selective"}),
        ("naive", {"checkpointing": "full", "checkpoint_every": 2}),
    ],
)
def test_a_step_under_autocast_is_exact_in_every_family(name, attention, how):
    live = Transformer(described(name), attention=attention, dtype=torch.float32, device="cpu")
    check_exact(live, "fp32", how | {"precision": "autocast"})


def check_exact(live, dtype, how, **what):
    """Every allocation of a step, its peak and the gradients that it leaves."""
    meter, dims = watched_step(live, 2, 17, **how), square(2, 17)
    what |= {name: value for name, value in how.items() if name != "precision"}
    what["autocast"] = "bf16" if how.get("precision") == "autocast" else None
    program = program_of(live.model, dims, attention=live.attention, dtype=dtype, **what)
    if getattr(live.model.positions, "rope_type", None) not in STRETCHED:
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
