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
REFUSED = {name for name in FAMILIES if name not in TRAINED}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("attention", [None, "naive"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens"), [(2, 17), (1, 1)])
def test_a_step_is_exact_in_every_family_that_is_planned(name, attention, dtype, batch, tokens):
    model = planner.read_config(FAMILIES[name]().to_dict())
    live = Transformer(model, attention=attention, dtype=DTYPES[dtype], device="cpu")
    meter, dims = watched_step(live, batch, tokens), square(batch, tokens)
    program = program_of(model, dims, attention=live.attention, dtype=dtype)
    assert curve(events(program, dims)) == curve(meter.events)
    highest = peak(program, dims)
    assert (highest.live_bytes, highest.kernel) == (meter.peak_bytes, meter.peak_op)
    gradients = sum(p.grad.nbytes for p in live.parameters())
    assert sum(change for _, change in events(program, dims)) == meter.live_bytes == gradients
