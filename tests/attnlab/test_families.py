"""Every family's logits against transformers: random weights, norms and biases, none neutral."""

from dataclasses import replace

import pytest
import torch

import planner
from attnlab.implementations import choose
from attnlab.positions import sinusoids
from attnlab.transformer import Transformer
from attnlab.weights import load_state_dict
from planner import ConfigError
from planner.layers import Sinusoidal
from tests.attnlab.families import FAMILIES, LLAMA
from tests.attnlab.rounding import assert_as_near, in_bfloat16
from tests.planner.configs import build

CLOSE = dict(rtol=1e-4, atol=2e-5)


def twin(ours, **settings):
    settings = dict(dtype=torch.float32, device="cpu") | settings
    other = Transformer(ours.model, **settings)
    other.load_state_dict(ours.state_dict())
    return other.requires_grad_(False)


def test_logits_equal_those_of_transformers(pair, ids):
    theirs, ours = pair
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids), expected, **CLOSE)


def test_naive_and_sdpa_agree(pair, ids):
    _, ours = pair
    if ours.attention == "naive":
        pytest.skip("a soft cap runs naive alone")
    torch.testing.assert_close(twin(ours, attention="naive")(ids), ours(ids), **CLOSE)


@pytest.mark.parametrize("attention", ["naive", "sdpa"])
def test_bfloat16_is_as_near_to_float32_as_transformers_is(pair, ids, attention):
    theirs, ours = pair
    if attention == "sdpa" and ours.attention == "naive":
        pytest.skip("a soft cap runs naive alone")
    exact = ours(ids)
    rounded = twin(ours, attention=attention, dtype=torch.bfloat16)(ids)
    with torch.no_grad():
        assert_as_near(rounded, in_bfloat16(theirs)(ids).logits, exact)


def test_parameters_are_those_the_planner_counts(pair):
    _, ours = pair
    built = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    assert built == {p.name: p.shape for p in ours.model.parameters()}


def test_every_kind_of_position_and_placement_is_among_the_families():
    models = [planner.read_config(make().to_dict()) for make in FAMILIES.values()]
    placements = {layer.placement for model in models for layer in model.layers}
    assert placements == {"pre", "post", "post-sum", "sandwich", "parallel", "parallel-two"}
    assert {type(model.positions).__name__ for model in models} >= {
        "RoPE",
        "ALiBi",
        "LearnedPositions",
    }


def test_long_sequences_use_the_long_factors(pairs):
    """Beyond original_max_position_embeddings, across the change, as transformers does."""
    for family in ("llama, longrope rope", "phi3, longrope", "llama, dynamic rope"):
        theirs, ours = pairs(family)
        for tokens in (9, 10, 11, 90):
            ids = torch.arange(tokens)[None] % 97
            with torch.no_grad():
                expected = theirs(ids).logits
            torch.testing.assert_close(ours(ids), expected, **CLOSE)


def test_sinusoids_are_added_to_the_embedding(pairs):
    _, learned = pairs("gpt2")
    model = replace(learned.model, positions=Sinusoidal())
    ours = Transformer(model, dtype=torch.float32, device="cpu").requires_grad_(False)
    state = learned.state_dict()
    state["embed_positions.weight"] = sinusoids(torch.arange(64), 32, torch.float32)
    table = twin(learned)
    table.load_state_dict(state)
    del state["embed_positions.weight"]
    ours.load_state_dict(state)
    ids = torch.arange(13)[None]
    torch.testing.assert_close(ours(ids), table(ids), **CLOSE)


def test_unknown_attention_names_what_there_is(pairs):
    layers = pairs("llama")[1].model.layers
    message = "attention='flash' is not allowed: one of naive, sdpa, flex, sdpa:flash"
    with pytest.raises(ConfigError, match=message):
        choose("flash", layers)


@pytest.mark.parametrize("kind", ["longrope", "yarn"])
def test_phi3_reads_its_trained_length_where_the_published_files_have_it(kind):
    """At the top of config.json, beside rope_scaling; the class takes yarn for longrope."""
    config = {
        **{name: value for name, value in LLAMA.items() if not name.endswith("_token_id")},
        "model_type": "phi3",
        "pad_token_id": 0,
        "original_max_position_embeddings": 10,
        "rope_scaling": {
            "type": kind,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    }
    live = build(config, device="cpu", dtype=torch.float32)
    ours = Transformer(planner.read_config(config), dtype=torch.float32, device="cpu")
    load_state_dict(ours, live.state_dict())
    for tokens in (9, 30):
        ids = torch.arange(tokens)[None]
        with torch.no_grad():
            torch.testing.assert_close(ours(ids), live(ids).logits, **CLOSE)
