"""Oracle: the modules that transformers builds on the meta device."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from tests.planner.configs import BASE, TINY, build
from tests.properties import examples

PUBLISHED = {
    "bloom-176b": 176_247_271_424,
    "bloom-560m": 559_214_592,
    "codellama-34b": 33_743_970_304,
    "gemma-2-27b": 27_227_128_320,
    "gemma-2-2b": 2_614_341_888,
    "gpt2-large": 774_030_080,
    "gpt2-medium": 354_823_168,
    "gpt2-xl": 1_557_611_200,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-2-7b": 6_738_415_616,
    "llama-3-70b": 70_553_706_496,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-large-123b": 122_610_069_504,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "mixtral-8x22b": 140_630_071_296,
    "mixtral-8x7b": 46_702_792_704,
    "olmo2-13b": 13_716_198_400,
    "olmo2-32b": 32_234_279_936,
    "olmo2-7b": 7_298_617_344,
    "phi-3-medium-4k": 13_960_238_080,
    "phi-4": 14_659_507_200,
    "pythia-1.4b": 1_414_647_808,
    "pythia-12b": 11_846_072_320,
    "pythia-410m": 405_334_016,
    "pythia-6.9b": 6_857_302_016,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "yi-34b": 34_388_917_248,
    "yi-6b": 6_061_035_520,
}


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
@examples(25)
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


@pytest.mark.parametrize(("name", "published"), PUBLISHED.items())
def test_parameter_counts_match_the_model_cards(name, published):
    """Totals as the model pages are remembered to show them, written down before ours was counted
    and not looked up again; the oracle is the live class, above."""
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
