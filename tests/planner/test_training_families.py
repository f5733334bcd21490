"""Training steps of every family that attnlab runs: exact to the byte."""

from __future__ import annotations

import pytest

import planner
from attnlab.lora import add_adapters
from attnlab.transformer import Transformer
from planner import ConfigError
from planner.activations import peak
from planner.layers import MoE
from planner.runtimes.attnlab_training.mixture import check_trained
from tests.attnlab.families import FAMILIES, PLANNED
from tests.planner.steps import DTYPES, curve, events, program_of, square, watched_step

STRETCHED = ("dynamic", "yarn", "longrope")  # their tables have small temporaries of their own
UNTRAINED = {
    "phimoe": "whose router is sparsemixer is not planned",
    "ernie4_5_moe": "whose correction is a parameter without a gradient is not planned",
}


def described(name):
    return planner.read_config(FAMILIES[name]().to_dict())


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


@pytest.mark.parametrize("name", [name for name in PLANNED if name not in UNTRAINED])
@pytest.mark.parametrize(
    ("attention", "dtype", "adapters", "how"),
    [
        (None, "bf16", None, {}),
        ("naive", "bf16", "bf16", {"checkpointing": "full", "checkpoint_every": 2}),
        (None, "fp32", None, {"checkpointing": "selective"}),
    ],
)
def test_a_step_with_adapters_is_exact_in_every_family(name, attention, dtype, adapters, how):
    model = described(name)
    mixture = any(isinstance(layer.feed_forward, MoE) for layer in model.layers)
    lora = planner.LoRA(rank=3, targets=("o_proj",) if mixture else "all-linear", dtype=adapters)
    live = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    add_adapters(live, lora)
    meter, dims = watched_step(live, 2, 17, **how), square(2, 17)
    program = program_of(model, dims, attention=live.attention, dtype=dtype, lora=lora, **how)
    if getattr(model.positions, "rope_type", None) not in STRETCHED:
        assert curve(events(program, dims)) == curve(meter.events)
    highest = peak(program, dims)
    assert (highest.live_bytes, highest.kernel) == (meter.peak_bytes, meter.peak_op)
    gradients = sum(p.grad.nbytes for p in live.parameters() if p.grad is not None)
    assert sum(change for _, change in events(program, dims)) == meter.live_bytes == gradients
