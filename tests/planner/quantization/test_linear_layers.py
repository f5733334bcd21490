"""Which parameters quantisers replace. Oracle: nn.Linear and Conv1D modules of the live classes."""

from __future__ import annotations

import pytest

import planner
from tests.planner.oracle import linear_weights, live_model
from tests.planner.runtimes.test_static_caches import CASES


@pytest.mark.parametrize("name", CASES)
def test_linear_layers_are_those_of_the_class(name):
    model, live = planner.read_config(CASES[name]), live_model(CASES[name])
    assert {p.name for p in model.checkpoint_parameters() if p.linear} == linear_weights(live)
