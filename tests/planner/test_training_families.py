"""Training steps of every family that attnlab runs: exact to the byte, or refused by name."""

from __future__ import annotations

import pytest

import planner
from attnlab.transformer import Transformer
from planner import ConfigError
from planner.activations import peak
from planner.runtimes.attnlab_training import check_trained
from tests.attnlab.families import FAMILIES
from tests.planner.steps import DTYPES, curve, events, program_of, square, watched_step


def trained(name):
    model = planner.read_config(FAMILIES[name]().to_dict())
    try:
        check_trained(model)
    except ConfigError:
        return False
    return True


TRAINED = [name for name in FAMILIES if trained(name)]
STRETCHED = ("dynamic", "yarn", "longrope")  # their tables have small temporaries of their own
REFUSED = {name for name in FAMILIES if name not in TRAINED}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize(
    ("attention", "dtype", "batch", "tokens"),
    [(None, "bf16", 2, 17), ("naive", "fp32", 2, 17), ("naive", "bf16", 1, 1)],
)
def test_a_step_is_exact_in_every_family_that_is_planned(name, attention, dtype, batch, tokens):
    model = planner.read_config(FAMILIES[name]().to_dict())
    live = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    meter, dims = watched_step(live, batch, tokens), square(batch, tokens)
    program = program_of(model, dims, attention=live.attention, dtype=dtype)
    if not any(kind in name for kind in STRETCHED):
        assert curve(events(program, dims)) == curve(meter.events)
    highest = peak(program, dims)
    assert (highest.live_bytes, highest.kernel) == (meter.peak_bytes, meter.peak_op)
    gradients = sum(p.grad.nbytes for p in live.parameters())
    assert sum(change for _, change in events(program, dims)) == meter.live_bytes == gradients


def test_what_is_refused_is_named():
    assert {reason(name) for name in REFUSED} == {
        "ALiBi",
        "clipped queries and keys",
        "interleaved fused projections",
        "interleaved rotary positions",
        "norms of each head",
    }


def reason(name):
    with pytest.raises(ConfigError) as refused:
        check_trained(planner.read_config(FAMILIES[name]().to_dict()))
    return str(refused.value).removeprefix("training with ").split(" is not planned")[0]
