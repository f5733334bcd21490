"""Which parameters quantisers replace. Oracle: nn.Linear and Conv1D modules of the live classes."""

from __future__ import annotations

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import planner
from tests.planner.oracle import live_model
from tests.planner.test_static_caches import CASES


@pytest.mark.parametrize("name", CASES)
def test_linear_layers_are_those_of_the_class(name):
    model, live = planner.read_config(CASES[name]), live_model(CASES[name])
    trained = dict(live.named_parameters())
    expected = {
        f"{module}.weight"
        for module, made in live.named_modules()
        if isinstance(made, torch.nn.Linear | Conv1D) and f"{module}.weight" in trained
    }
    assert {p.name for p in model.checkpoint_parameters() if p.linear} == expected
