import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as rotate_neighbours
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from attnlab.positions import ROPE_TYPES, RotaryTables, frequencies, rotate, sinusoids
from planner import ConfigError
from planner.layers import RoPE
from tests.attnlab.families import ROPES

CPU = torch.device("cpu")
TRAINED = 64
EXACT = dict(rtol=1e-6, atol=0)


def rope_of(parameters, R=16):
    rest = {k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items()}
    kind, theta = rest.pop("rope_type"), rest.pop("rope_theta")
    return RoPE(rope_theta=theta, rotary_dim=R, rope_type=kind, scaling=tuple(sorted(rest.items())))


def tables(rope, tokens=5):
    made = RotaryTables(rope, TRAINED, CPU)
    return made(torch.arange(tokens), tokens, torch.float32)


@pytest.mark.parametrize("tokens", [4, 11, TRAINED, 3 * TRAINED])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_and_factor_equal_those_of_transformers(name, tokens):
    parameters = ROPES[name]
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=TRAINED,
        rope_parameters=dict(parameters),
    )  # fmt: skip
    expected, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, CPU, seq_len=tokens)
    ours, our_factor = frequencies(rope_of(parameters), trained_tokens=TRAINED, tokens=tokens)
    torch.testing.assert_close(ours, expected, **EXACT)
    assert our_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("tokens", [9, 40, 150])
@pytest.mark.parametrize("name", ROPES)
def test_tables_equal_those_of_transformers_at_any_length(name, tokens):
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=TRAINED,
        rope_parameters=dict(ROPES[name]),
    )  # fmt: skip
    positions = torch.arange(tokens)[None]
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    for ours, theirs in zip(tables(rope_of(ROPES[name]), tokens), expected, strict=True):
        torch.testing.assert_close(ours[:, 0], theirs[0], rtol=1e-5, atol=1e-5)


def test_ntk_is_the_base_that_dynamic_reaches():
    dynamic = rope_of(dict(rope_type="dynamic", rope_theta=1e4, factor=3.0))
    reached = 3.0 * 4 - 2.0  # at four times the trained length
    fixed = rope_of(dict(rope_type="ntk", rope_theta=1e4, factor=reached))
    there, _ = frequencies(dynamic, trained_tokens=TRAINED, tokens=4 * TRAINED)
    ours, _ = frequencies(fixed, trained_tokens=TRAINED, tokens=5)
    torch.testing.assert_close(ours, there, **EXACT)


def test_ntk_leaves_the_fastest_pair_and_divides_the_slowest_by_the_factor():
    """bloc97's derivation: the base is chosen so that the last pair is interpolated in full."""
    fixed = rope_of(dict(rope_type="ntk", rope_theta=1e4, factor=8.0))
    plain = rope_of(dict(rope_type="default", rope_theta=1e4))
    ours, _ = frequencies(fixed, trained_tokens=TRAINED, tokens=5)
    base, _ = frequencies(plain, trained_tokens=TRAINED, tokens=5)
    assert (base / ours)[[0, -1]].tolist() == pytest.approx([1.0, 8.0], rel=1e-5)


@pytest.mark.parametrize(
    ("interleaved", "theirs"), [(False, apply_rotary_pos_emb), (True, rotate_neighbours)]
)
def test_rotation_equals_that_of_transformers(interleaved, theirs):
    rope = RoPE(rope_theta=1e4, rotary_dim=8, interleaved=interleaved)
    cos, sin = tables(rope)
    q = torch.randn(2, 5, 3, 8)
    expected, _ = theirs(q, q, cos[None, :, 0], sin[None, :, 0], unsqueeze_dim=2)
    torch.testing.assert_close(rotate(q, cos, sin, interleaved=interleaved), expected)


def test_positions_of_their_own_for_each_sequence_rotate_as_one_by_one():
    made = RotaryTables(RoPE(rope_theta=1e4, rotary_dim=8), TRAINED, CPU)
    positions = torch.tensor([[0, 1, 2], [7, 8, 9]])
    q = torch.randn(2, 3, 4, 8)
    both = rotate(q, *made(positions, 10, torch.float32))
    for b in range(2):
        alone = rotate(q[b : b + 1], *made(positions[b], 10, torch.float32))
        assert torch.equal(both[b : b + 1], alone)


def test_dimensions_beyond_rotary_dim_pass():
    q = torch.randn(2, 5, 3, 8)
    turned = rotate(q, *tables(RoPE(rope_theta=1e4, rotary_dim=4)))
    assert torch.equal(turned[..., 4:], q[..., 4:])


def test_sinusoids_equal_those_of_marian():
    theirs = MarianSinusoidalPositionalEmbedding(20, 12).create_weight()
    ours = sinusoids(torch.arange(20), 12, torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (dict(rope_type="spiral"), f"rope_type='spiral' is not allowed: one of {ROPE_TYPES[0]}"),
        (dict(rope_type="linear"), "factor=None is not allowed for rope_type=linear"),
        (dict(rope_type="yarn", factor=2.0), "original_max_position_embeddings=None is not"),
        (
            dict(rope_type="llama3", factor=8.0, high_freq_factor=1.0, low_freq_factor=1.0),
            r"high_freq_factor=1\.0 is not above low_freq_factor=1\.0",
        ),
        (
            dict(rope_type="longrope", original_max_position_embeddings=8, short_factor=[1.0]),
            "short_factor=.* is not allowed: 8 numbers",
        ),
    ],
)
def test_bad_rotary_positions_are_rejected(parameters, message):
    with pytest.raises(ConfigError, match=message):
        frequencies(rope_of(dict(rope_theta=1e4) | parameters), trained_tokens=64, tokens=5)


def test_an_odd_number_of_rotary_dimensions_is_rejected():
    with pytest.raises(ConfigError, match="rotary_dim=7 is not allowed"):
        frequencies(RoPE(rope_theta=1e4, rotary_dim=7), trained_tokens=64, tokens=5)


def test_slow_pairs_of_a_linear_rope_turn_slower_by_the_factor():
    cos, _ = tables(rope_of(ROPES["linear"]), 9)
    plain, _ = tables(RoPE(rope_theta=1e4, rotary_dim=16), 9)
    torch.testing.assert_close(cos[8], plain[2])
    assert math.isclose(float(cos[0].min()), 1.0)
