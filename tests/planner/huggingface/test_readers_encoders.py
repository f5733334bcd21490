"""Oracle: modules of transformers' own classes on the meta device, and what they run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError, Deployment, Inference, kv_cache_bytes
from planner.huggingface import bert_like, bert_relatives, deberta, encoders, modernbert
from planner.layers import GQA
from tests.planner.oracle import assert_same_parameters, live_model
from tests.properties import examples

ROBERTAS = ("roberta", "xlm-roberta", "camembert")
ENDINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "bert": ("Bert", bert_like.BERT_ENDINGS),
    "camembert": ("Camembert", bert_like.ROBERTA_ENDINGS),
    "deberta": ("Deberta", deberta.ENDINGS),
    "deberta-v2": ("DebertaV2", deberta.V2_ENDINGS),
    "distilbert": ("DistilBert", bert_relatives.DISTILBERT_ENDINGS),
    "modernbert": ("ModernBert", modernbert.ENDINGS),
    "mpnet": ("MPNet", bert_like.ROBERTA_ENDINGS),
    "roberta": ("Roberta", bert_like.ROBERTA_ENDINGS),
    "xlm-roberta": ("XLMRoberta", bert_like.ROBERTA_ENDINGS),
}
TYPES = tuple(ENDINGS)
assert set(TYPES) == set(encoders.READERS)
CLASSES = [(kind, stem + ending) for kind, (stem, all_) in ENDINGS.items() for ending in all_]
SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "intermediate_size": 14,
    "hidden_dim": 14,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "pad_token_id": 1,
}
FULL, SLIDING = "full_attention", "sliding_attention"
RELATIVE = {"relative_attention": True, "pos_att_type": "p2c|c2p"}
V3 = {
    **RELATIVE,
    "position_buckets": 6,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
    "max_relative_positions": -1,
    "pooler_hidden_size": 24,
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in TYPES),
    ("bert", {"hidden_act": "relu", "layer_norm_eps": 1e-5, "type_vocab_size": 5}),
    ("bert", {"position_embedding_type": "absolute", "pad_token_id": None}),
    ("distilbert", {"sinusoidal_pos_embds": True, "dim": 18, "n_heads": 2, "n_layers": 1}),
    ("mpnet", {"relative_attention_num_buckets": 40, "pad_token_id": 7}),
    ("roberta", {"pad_token_id": 3}),
    ("deberta", RELATIVE),
    ("deberta", {**RELATIVE, "pos_att_type": ["p2c"], "position_biased_input": False}),
    ("deberta", {**RELATIVE, "pos_att_type": "c2p", "max_relative_positions": 9}),
    ("deberta", {"talking_head": True, "pos_att_type": ["c2p"], "type_vocab_size": 0}),
    ("deberta-v2", RELATIVE),
    ("deberta-v2", V3),
    ("deberta-v2", {**V3, "share_att_key": False, "conv_kernel_size": 3, "conv_act": "gelu"}),
    ("deberta-v2", {"conv_kernel_size": 5, "conv_groups": 3, "norm_rel_ebd": "none|Layer_Norm"}),
    ("deberta-v2", {**RELATIVE, "pos_att_type": ["c2p"], "max_relative_positions": 9}),
    ("modernbert", {"attention_bias": True, "mlp_bias": True, "norm_bias": True}),
    ("modernbert", {"layer_types": [SLIDING, FULL, FULL, SLIDING], "local_attention": 6}),
    ("modernbert", {"global_attn_every_n_layers": 2, "layer_types": None}),
    ("modernbert", {"global_rope_theta": 5.0, "local_rope_theta": 6.0, "hidden_size": 30}),
]


def tiny(kind: str, **change: Any) -> dict[str, Any]:
    return {**SMALL, "model_type": kind, **change}


def build(config: dict[str, Any], device: str = "meta") -> Any:
    return live_model(config, auto="model", device=device)


@pytest.mark.parametrize(
    ("kind", "change"), VARIANTS, ids=[f"{i} {kind}" for i, (kind, _) in enumerate(VARIANTS)]
)
def test_parameters_are_those_of_the_class_and_nothing_is_cached(kind, change):
    config = tiny(kind, **change)
    model, live = planner.read_config(config), build(config, "cpu")
    assert_same_parameters(model, live)
    assert model.active_parameter_count == model.parameter_count
    with torch.no_grad():  # deberta keeps two biases in float32 and does not run in bf16
        output = live.float()(input_ids=torch.full((2, 5), 4))
    assert output.last_hidden_state.shape == (2, 5, model.hidden_size)
    assert getattr(output, "past_key_values", None) is None
    assert kv_cache_bytes(model, batch=2, context_tokens=5) == 0


@pytest.mark.parametrize(("kind", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_every_head_has_the_parameters_of_its_class(kind, name):
    count = 2 if name == "DistilBertForQuestionAnswering" else 3
    labels = {str(i): "a" for i in range(count)}
    for more in (
        {"tie_word_embeddings": False, "decoder_bias": False, "classifier_bias": True},
        {"tie_word_embeddings": True, "id2label": labels, "norm_bias": True},
        {"legacy": False, "tie_word_embeddings": False},
        {"num_labels": count, "id2label": {"0": "num_labels has the last word"}},
    ):
        config = tiny(kind, architectures=[name], **more)
        assert_same_parameters(planner.read_config(config), build(config))


@pytest.mark.parametrize("kind", TYPES)
def test_absent_fields_take_the_defaults_of_their_class(kind):
    config = {"model_type": kind, "num_hidden_layers": 2}
    model = planner.read_config(config)
    assert_same_parameters(model, build(config))
    assert any(default.startswith("vocab_size=") for default in model.defaults)


@given(data=st.data())
@examples(32)
def test_random_configs_have_the_parameters_of_their_class(data):
    draw = data.draw
    kind = draw(st.sampled_from(TYPES))
    stem, endings = ENDINGS[kind]
    heads, size, flag = draw(st.integers(1, 4)), st.integers(1, 40), st.booleans()
    words = ["c2p", "p2c"]
    config = tiny(
        kind,
        architectures=draw(st.none() | st.sampled_from([[stem + e] for e in endings])),
        num_labels=draw(st.integers(1, 5)),
        num_attention_heads=heads,
        hidden_size=2 * heads * draw(st.integers(1, 5)),
        num_hidden_layers=draw(st.integers(1, 4)),
        intermediate_size=draw(size),
        hidden_dim=draw(size),
        vocab_size=draw(st.integers(4, 90)),
        max_position_embeddings=draw(st.integers(3, 40)),
        type_vocab_size=draw(st.integers(1, 4)),
        pos_att_type=draw(st.none() | st.lists(st.sampled_from(words))),
        max_relative_positions=draw(st.integers(-1, 9)),
        position_buckets=draw(st.integers(-1, 9)),
        conv_kernel_size=draw(st.sampled_from([0, 1, 3])),
        local_attention=draw(size),
        global_attn_every_n_layers=draw(st.integers(1, 5)),
        **{
            name: draw(flag)
            for name in (
                "tie_word_embeddings",
                "relative_attention",
                "position_biased_input",
                "share_att_key",
                "talking_head",
                "legacy",
                "attention_bias",
                "mlp_bias",
                "norm_bias",
                "decoder_bias",
                "classifier_bias",
            )
        },
    )
    if config["architectures"] == ["DistilBertForQuestionAnswering"]:
        config["num_labels"] = 2
    model = planner.read_config(config)
    assert_same_parameters(model, build(config))
    assert kv_cache_bytes(model, batch=1, context_tokens=9) == 0


@pytest.mark.parametrize(
    ("kind", "change"),
    [("bert", {}), ("roberta", {}), ("xlm-roberta", {"pad_token_id": 3}), ("mpnet", {})],
)
def test_positions_end_where_the_table_ends(kind, change):
    config = tiny(kind, **change)
    model, live = planner.read_config(config), build(config, "cpu")
    assert model.max_position_embeddings is not None
    with torch.no_grad():
        live(input_ids=torch.full((1, model.max_position_embeddings), 4))
        with pytest.raises((IndexError, RuntimeError)):
            live(input_ids=torch.full((1, model.max_position_embeddings + 1), 4))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"layer_types": [SLIDING, FULL, SLIDING, SLIDING], "local_attention": 6},
        {"global_attn_every_n_layers": 2},
        {"sliding_window": 5},
        {"global_rope_theta": 5.0, "local_rope_theta": 6.0},
        {"rope_parameters": {FULL: {"rope_theta": 7.0, "rope_type": "linear", "factor": 2.0}}},
    ],
)
def test_modernbert_has_the_windows_and_the_positions_of_its_class(change):
    config = tiny("modernbert", **change)
    model, live = planner.read_config(config), build(config)
    for layer, module in zip(model.layers, live.layers, strict=True):
        assert isinstance(layer.attention, GQA)
        window = layer.attention.sliding_window
        assert (None if window is None else window // 2 + 1) == module.attn.sliding_window
    for kind, rope in ((FULL, model.positions), (SLIDING, model.local_positions)):
        assert rope is not None
        assert rope.rope_theta == live.config.rope_parameters[kind]["rope_theta"]
        assert rope.rope_type == live.config.rope_parameters[kind]["rope_type"]


@pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "bert"])
def test_activations_and_times_are_refused_and_so_are_other_runtimes(kind):
    model = planner.read_config(tiny(kind))
    work = Inference(batch=1, prompt_tokens=8)
    with pytest.raises(ConfigError, match="does not plan bidirectional encoders"):
        planner.estimate(model, work, Deployment(gpu="h200"))
    with pytest.raises(ConfigError, match="encoder_tokens=4 is not allowed"):
        kv_cache_bytes(model, batch=1, context_tokens=4, encoder_tokens=4)
    if kind in ("deberta", "deberta-v2", "mpnet"):
        with pytest.raises(ConfigError, match="runtime=attnlab does not"):
            kv_cache_bytes(model, batch=1, context_tokens=4, runtime="attnlab")
    else:
        assert kv_cache_bytes(model, batch=1, context_tokens=4, runtime="attnlab") == 0
    assert kv_cache_bytes(model, batch=1, context_tokens=4, runtime="vllm") == 0


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("bert", {"is_decoder": True}, "is_decoder=True is not read yet: False"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention=True is not read yet"),
        ("bert", {"num_attention_heads": 5}, "not a multiple of num_attention_heads=5"),
        ("bert", {"hidden_act": "prelu"}, "hidden_act='prelu' is not allowed"),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size=0 is not allowed"),
        ("bert", {"pad_token_id": 30}, "pad_token_id=30 is not allowed: a row of vocab_size=30"),
        ("bert", {"pad_token_id": "0"}, "pad_token_id='0' is not allowed"),
        ("bert", {"architectures": ["BertLMHeadModel"]}, r"architectures\[0\]='BertLMHeadModel'"),
        ("bert", {"architectures": ["RobertaModel"]}, r"architectures\[0\]='RobertaModel'"),
        ("bert", {"num_labels": 0, "architectures": ["BertForTokenClassification"]}, "num_labels"),
        ("roberta", {"architectures": ["RobertaForCausalLM"]}, "RobertaForCausalLM"),
        ("roberta", {"pad_token_id": None}, "pad_token_id=None is not allowed"),
        ("roberta", {"max_position_embeddings": 2}, "max_position_embeddings=2"),
        ("mpnet", {"max_position_embeddings": 2}, "max_position_embeddings=2"),
        ("mpnet", {"relative_attention_num_buckets": 31}, "num_buckets=31 is not allowed"),
        (
            "distilbert",
            {"architectures": ["DistilBertForQuestionAnswering"], "num_labels": 3},
            "num_labels=3 is not allowed: 2",
        ),
        ("distilbert", {"activation": "no"}, "activation='no' is not allowed"),
        ("deberta", {"embedding_size": 8}, "embedding_size=8 is not read yet: hidden_size=24"),
        ("deberta", {**RELATIVE, "pos_att_type": 3}, "pos_att_type=3 is not allowed"),
        ("deberta", {**RELATIVE, "max_relative_positions": None}, "max_relative_positions=None"),
        (
            "deberta",
            {"architectures": ["DebertaForSequenceClassification"], "pooler_hidden_size": 8},
            "pooler_hidden_size=8 is not allowed",
        ),
        ("deberta-v2", {"attention_head_size": 4}, "attention_head_size=4 is not allowed: 8"),
        ("deberta-v2", {"conv_kernel_size": 2}, "conv_kernel_size=2 is not allowed: an odd"),
        ("deberta-v2", {"conv_kernel_size": 3, "conv_groups": 5}, "multiple of conv_groups=5"),
        ("deberta-v2", {"norm_rel_ebd": None}, "norm_rel_ebd=None is not allowed"),
        ("modernbert", {"rope_scaling": {"type": "linear"}}, "rope_scaling=.* is not read yet"),
        ("modernbert", {"global_attn_every_n_layers": 0}, "every_n_layers=0 is not allowed"),
        ("modernbert", {"layer_types": [FULL]}, "layer_types=.* a list of 4 words"),
        ("modernbert", {"hidden_size": 27}, "head_dim=9 gives 9 rotary dimensions"),
        ("modernbert", {"pad_token_id": 50283}, "pad_token_id=50283 is not allowed"),
        (
            "modernbert",
            {"architectures": ["ModernBertForTokenClassification"], "classifier_pooling": "max"},
            "classifier_pooling='max' is not allowed",
        ),
    ],
)
def test_a_value_that_is_not_read_is_refused_by_name(kind, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        planner.read_config(tiny(kind, **change))
    assert "\n" not in str(caught.value)
