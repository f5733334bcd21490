"""Oracle: the modules that transformers builds on the meta device."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import planner
from tests.planner.configs import BASE, TINY, build


def live_parameters(config: dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in build(config).named_parameters()}


def our_parameters(model: planner.Model) -> dict[str, tuple[int, ...]]:
    return {p.name: p.shape for p in model.checkpoint_parameters()}


@pytest.mark.parametrize("name", planner.catalogue())
def test_every_catalogue_model_has_the_parameters_of_its_class(name):
    model = planner.load_model(name)
    expected = live_parameters(model.config)
    assert our_parameters(model) == expected
    assert model.parameter_count == sum(p.numel() for p in build(model.config).parameters())


@pytest.mark.parametrize("name", TINY)
def test_every_reader_has_the_names_and_shapes_of_its_class(name):
    assert our_parameters(planner.read_config(TINY[name])) == live_parameters(TINY[name])


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_random_configs_have_the_parameters_of_their_class(data):
    draw = data.draw
    kind = draw(st.sampled_from(["llama", "mistral", "qwen2", "gemma2", "phi3", "mixtral"]))
    groups = draw(st.sampled_from([1, 2, 4]))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * groups
    config = {
        **BASE,
        "model_type": kind,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": 8 * heads,
        "num_hidden_layers": draw(st.integers(1, 4)),
        "intermediate_size": draw(st.integers(1, 50)),
        "vocab_size": draw(st.integers(4, 90)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if kind == "phi3":
        config["pad_token_id"] = 0
    if kind in ("llama", "mistral", "gemma2"):
        config["head_dim"] = 2 * draw(st.integers(1, 9))
    if kind in ("llama", "gemma2"):
        config["attention_bias"] = draw(st.booleans())
    if kind == "mixtral":
        config["num_local_experts"] = draw(st.integers(2, 5))
    assert our_parameters(planner.read_config(config)) == live_parameters(config)


def test_absent_fields_take_the_defaults_of_their_class():
    for kind in ("llama", "gpt2", "gemma2", "qwen2"):
        model = planner.read_config({"model_type": kind})
        assert our_parameters(model) == live_parameters({"model_type": kind})
        assert model.defaults


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.1-8b", 8_030_261_248),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_parameter_counts_match_the_model_cards(name, published):
    """Safetensors metadata on the Hub: Llama-2-7b-hf, Llama-3.1-8B, Mixtral-8x7B-v0.1."""
    assert planner.load_model(name).parameter_count == published


def test_active_parameters_leave_idle_experts_out():
    """Mixtral of experts, arXiv:2401.04088: 47B parameters, 13B active."""
    assert round(planner.load_model("mixtral-8x7b").active_parameter_count / 1e9) == 13
    model = planner.load_model("llama-3.1-8b")
    assert model.active_parameter_count == model.parameter_count


def test_the_table_adds_up_and_names_its_groups():
    model = planner.load_model("gpt2")
    table = model.parameter_table()
    assert list(table.columns) == ["name", "group", "layer", "shape", "count"]
    assert table["count"].sum() == model.parameter_count
    assert table.loc[table.name == "transformer.wte.weight", "layer"].isna().all()
