"""Training steps of every family that attnlab runs: exact to the byte."""

from __future__ import annotations

import pytest

import planner
from attnlab.transformer import Transformer
from planner.activations import peak
from tests.attnlab.families import FAMILIES, PLANNED
from tests.planner.steps import DTYPES, curve, events, program_of, square, watched_step

STRETCHED = ("dynamic", "yarn", "longrope")  # their tables have small temporaries of their own


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize(
    ("attention", "dtype", "batch", "tokens", "checkpointing"),
    [
        (None, "bf16", 2, 17, "none"),
        ("naive", "fp32", 2, 17, "full"),
        ("naive", "bf16", 1, 1, "none"),
    ],
)
def test_a_step_is_exact_in_every_family(name, attention, dtype, batch, tokens, checkpointing):
    model = planner.read_config(FAMILIES[name]().to_dict())
    live = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    how = {"checkpointing": checkpointing}
    meter, dims = watched_step(live, batch, tokens, **how), square(batch, tokens)
    program = program_of(model, dims, attention=live.attention, dtype=dtype, **how)
    if not any(kind in name for kind in STRETCHED):
        assert curve(events(program, dims)) == curve(meter.events)
    highest = peak(program, dims)
    assert (highest.live_bytes, highest.kernel) == (meter.peak_bytes, meter.peak_op)
    gradients = sum(p.grad.nbytes for p in live.parameters())
    assert sum(change for _, change in events(program, dims)) == meter.live_bytes == gradients
