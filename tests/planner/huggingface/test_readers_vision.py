"""Oracle: transformers' own encoders of images, and of text beside them, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError, kv_cache_bytes
from tests.planner.oracle import assert_same_parameters, linear_weights, live_model
from tests.properties import examples

BLOCKS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGES: dict[str, Any] = {**BLOCKS, "image_size": 24, "patch_size": 4}
TEXT: dict[str, Any] = {**BLOCKS, "vocab_size": 30, "max_position_embeddings": 9}
BOTH: dict[str, Any] = {
    "text_config": {**TEXT, "hidden_size": 16},
    "vision_config": IMAGES,
    "projection_dim": 12,
}
OWN: dict[str, dict[str, Any]] = {
    "vit": IMAGES,
    "dinov2": IMAGES,
    "clip": BOTH,
    "siglip": BOTH,
    "clip_text_model": TEXT,
    "siglip_text_model": {**TEXT, "architectures": ["SiglipTextModel"]},
    "clip_vision_model": IMAGES,
    "siglip_vision_model": IMAGES,
}
LABELS = {"id2label": {"0": "cat", "1": "dog", "2": "owl"}}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in OWN),
    ("vit", {"qkv_bias": False, "pooler_output_size": 7, "num_channels": 1}),
    ("vit", {"image_size": [24, 17], "patch_size": [4, 5], "pooler_output_size": 0}),
    ("vit", {"num_attention_heads": 5, "hidden_size": 33}),
    ("vit", {"head_dim": 6, "num_key_value_heads": 2}),
    ("vit", {"architectures": ["ViTForImageClassification"]}),
    ("vit", {"architectures": ["ViTForImageClassification"], **LABELS, "num_labels": 9}),
    ("vit", {"architectures": ["ViTForImageClassification"], "num_labels": 0}),
    ("vit", {"architectures": ["ViTForMaskedImageModeling"], "encoder_stride": 4}),
    ("dinov2", {"use_swiglu_ffn": True, "use_mask_token": False, "mlp_ratio": 3}),
    ("dinov2", {"qkv_bias": False, "head_dim": 6, "image_size": [24, 17]}),
    ("dinov2", {"architectures": ["Dinov2ForImageClassification"], "num_labels": 5}),
    ("dinov2", {"architectures": ["Dinov2Backbone"], "out_features": ["stage1"]}),
    ("clip", {"text_config": None, "vision_config": {"image_size": 65, "num_channels": 1}}),
    ("clip", {"text_config_dict": {"hidden_size": 24}, "vision_config_dict": None}),
    ("clip", {"vision_config_dict": {"num_hidden_layers": 1}}),
    ("clip", {"architectures": ["CLIPForImageClassification"], "num_labels": 5}),
    ("clip", {"logit_scale_init_value": -3.0, "projection_dim": 3}),
    ("siglip", {"text_config": {**TEXT, "projection_size": 5}}),
    ("siglip", {"vision_config": {**IMAGES, "vision_use_head": False}}),
    ("siglip", {"text_config_dict": {"hidden_size": 24}, "text_config": None}),
    ("siglip", {"architectures": ["SiglipForImageClassification"], **LABELS}),
    ("clip_text_model", {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": 3}),
    ("clip_vision_model", {"architectures": ["CLIPVisionModelWithProjection"]}),
    ("siglip_vision_model", {"vision_use_head": False, "image_size": 25}),
    ("siglip_text_model", {"projection_size": 3}),
]


def config_of(kind: str, **change: Any) -> dict[str, Any]:
    return {"model_type": kind, **OWN[kind], **change}


def assert_exact(config: dict[str, Any]) -> None:
    model, live = planner.read_config(config), live_model(config, auto="model")
    assert_same_parameters(model, live)
    assert {p.name for p in model.checkpoint_parameters() if p.linear} == linear_weights(live)
    assert model.active_parameter_count == model.parameter_count
    assert not kv_cache_bytes(model, batch=2, context_tokens=5, dtype="bf16")


@pytest.mark.parametrize(
    ("kind", "change"), VARIANTS, ids=[f"{i} {kind}" for i, (kind, _) in enumerate(VARIANTS)]
)
def test_parameters_are_those_of_the_class_and_there_is_no_cache(kind, change):
    assert_exact(config_of(kind, **change))


@pytest.mark.parametrize("kind", OWN)
def test_absent_fields_take_the_defaults_of_their_class(kind):
    config: dict[str, Any] = {"model_type": kind}
    if kind == "siglip_text_model":
        config["architectures"] = ["SiglipTextModel"]  # it has no auto class
    assert_exact(config)


@given(data=st.data())
@examples(40)
def test_random_configs_have_the_parameters_of_their_class(data):
    draw = data.draw
    kind = draw(st.sampled_from(sorted(OWN)))
    config = config_of(kind)
    parts = ("text_config", "vision_config") if kind in ("clip", "siglip") else ("",)
    for part in parts:
        heads = draw(st.integers(1, 4))
        change = {
            "num_attention_heads": heads,
            "hidden_size": heads * draw(st.integers(1, 9)),
            "intermediate_size": draw(st.integers(1, 40)),
            "num_hidden_layers": draw(st.integers(1, 4)),
            "num_channels": draw(st.integers(1, 4)),
            "image_size": draw(st.integers(8, 40)),
            "patch_size": draw(st.integers(1, 8)),
            "vocab_size": draw(st.integers(2, 40)),
            "max_position_embeddings": draw(st.integers(1, 40)),
            "projection_size": draw(st.none() | st.integers(1, 20)),
            "projection_dim": draw(st.integers(1, 20)),
        }
        for flag in ("qkv_bias", "use_swiglu_ffn", "use_mask_token", "vision_use_head"):
            change[flag] = draw(st.booleans())
        if part:
            config[part] = {**config[part], **change}
        else:
            config |= change
    assert_exact(config)


def test_text_and_images_are_counted_apart():
    config = config_of("clip")
    model, live = planner.read_config(config), live_model(config, auto="model")
    groups = model.parameter_groups()
    vision = sum(p.numel() for p in live.vision_model.parameters())
    assert groups["vision"][1] == vision
    assert groups["projector"][1] == 12 * (32 + 16)
    table = model.parameter_table()
    text = table[table["name"].str.startswith("text_model.")]
    assert text["count"].sum() == sum(p.numel() for p in live.text_model.parameters())
    assert not set(text["group"]) & {"vision", "projector"}


def test_defaults_of_the_parts_are_told_with_the_part():
    defaults = planner.read_config({"model_type": "clip", "text_config": TEXT}).defaults
    assert "vision_config.patch_size=32" in defaults
    assert "projection_dim=512" in defaults
    assert not any(d.startswith("text_config.hidden_size") for d in defaults)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("vit", {"architectures": ["ViTForDreams"]}, r"architectures\[0\]='ViTForDreams'"),
        ("vit", {"image_size": [24]}, r"image_size=\[24\] is not allowed"),
        ("vit", {"patch_size": 48}, r"image_size=\(24, 24\) is not allowed: at least"),
        ("vit", {"hidden_size": 3}, "hidden_size=3 is not a multiple of num_attention_heads=4"),
        ("vit", {"head_dim": None}, "head_dim is missing"),
        ("vit", {"pooler_act": "no"}, "pooler_act='no' is not allowed"),
        ("vit", {"hidden_act": "no"}, "hidden_act='no' is not allowed"),
        (
            "vit",
            {"architectures": ["ViTForImageClassification"], "id2label": [1]},
            r"id2label=\[1\] is not allowed",
        ),
        ("dinov2", {"mlp_ratio": 2.5}, "mlp_ratio=2.5 is not allowed"),
        ("dinov2", {"use_swiglu_ffn": 1}, "use_swiglu_ffn=1 is not allowed"),
        ("clip", {"text_config": 3}, "text_config=3 is not allowed"),
        ("clip", {"vision_config": {"hidden_size": 10}}, "^vision_config: hidden_size=10 is not a"),
        ("clip", {"text_config": {"vocab_size": -1}}, "^text_config: vocab_size=-1 is not"),
        ("clip", {"projection_dim": None}, "projection_dim is missing"),
        ("clip", {"logit_scale_init_value": None}, "logit_scale_init_value=None is not allowed"),
        ("clip", {"logit_scale_init_value": 3}, "logit_scale_init_value=3 is not allowed: a float"),
        ("clip_vision_model", {"image_size": [24, 24]}, "image_size=.* for squares"),
        ("clip_vision_model", {"patch_size": None}, "patch_size is missing"),
        ("siglip_vision_model", {"num_attention_heads": 5}, "num_attention_heads=5"),
        ("siglip_text_model", {"architectures": ["SiglipModel"]}, r"architectures\[0\]="),
    ],
)
def test_a_value_that_is_not_read_is_refused_by_name(kind, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        planner.read_config(config_of(kind, **change))
    assert "\n" not in str(caught.value)


def test_estimates_of_encoders_are_refused():
    model = planner.read_config(config_of("vit"))
    with pytest.raises(ConfigError, match="does not plan bidirectional encoders"):
        planner.runtimes.transformers.Transformers().attention(model, None)
