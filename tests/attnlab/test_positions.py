import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from attnlab.positions import RotaryTables, inverse_frequencies, rotate
from planner import ConfigError
from planner.layers import RoPE

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "llama-llama3-rope", "llama-linear-rope"])
def test_frequencies_equal_those_of_transformers(pairs, family):
    theirs, ours = pairs(family)
    expected = theirs.model.rotary_emb.inv_freq
    torch.testing.assert_close(ours.rotary.inv_freq, expected, rtol=1e-6, atol=0)


def test_rotation_equals_that_of_transformers():
    cos, sin = RotaryTables(RoPE(rope_theta=1e4, rotary_dim=8), CPU)(torch.arange(5), torch.float32)
    q = torch.randn(2, 5, 3, 8)
    expected, _ = apply_rotary_pos_emb(q, q, cos[None, :, 0], sin[None, :, 0], unsqueeze_dim=2)
    torch.testing.assert_close(rotate(q, cos, sin), expected)


def test_dimensions_beyond_rotary_dim_pass():
    cos, sin = RotaryTables(RoPE(rope_theta=1e4, rotary_dim=4), CPU)(torch.arange(5), torch.float32)
    q = torch.randn(2, 5, 3, 8)
    assert torch.equal(rotate(q, cos, sin)[..., 4:], q[..., 4:])


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            RoPE(rope_theta=1e4, rotary_dim=8, rope_type="yarn"),
            "rope_type='yarn' is not allowed: one of default, linear, llama3",
        ),
        (
            RoPE(rope_theta=1e4, rotary_dim=8, rope_type="linear"),
            "factor=None is not allowed for rope_type=linear",
        ),
        (
            RoPE(
                rope_theta=1e4,
                rotary_dim=8,
                rope_type="llama3",
                scaling=(("factor", 8.0), ("high_freq_factor", 1.0), ("low_freq_factor", 1.0)),
            ),
            r"high_freq_factor=1\.0 is not above low_freq_factor=1\.0",
        ),
        (RoPE(rope_theta=1e4, rotary_dim=7), "rotary_dim=7 is not allowed"),
    ],
)
def test_bad_rotary_positions_are_rejected(rope, message):
    with pytest.raises(ConfigError, match=message):
        inverse_frequencies(rope)
