import pytest
import torch
from transformers.activations import ACT2FN

from attnlab.feed_forward import ACTIVATIONS as OURS
from attnlab.feed_forward import FeedForward
from planner.layers import ACTIVATIONS, Dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_those_of_transformers_to_the_bit(name, dtype):
    dense = Dense(intermediate_size=8, activation=name, gated=False)
    x = torch.linspace(-5, 5, 101, dtype=dtype)
    assert torch.equal(FeedForward(dense, 4, dtype).act(x), ACT2FN[name](x))


def test_fused_gate_up_equals_two_matrices():
    dense = dict(intermediate_size=8, activation="silu", gated=True, bias=True)
    fused = FeedForward(Dense(**dense, fused_gate_up=True), 4, torch.float32)
    split = FeedForward(Dense(**dense), 4, torch.float32)
    state = fused.state_dict()
    for kind in ("weight", "bias"):
        gate_up = state.pop(f"gate_up_proj.{kind}")
        state[f"gate_proj.{kind}"], state[f"up_proj.{kind}"] = gate_up.chunk(2)
    split.load_state_dict(state)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(split(x), fused(x))


def test_every_activation_that_a_model_can_have_is_here():
    assert set(OURS) == set(ACTIVATIONS)
