"""Oracle: transformers' own wrappers of language models and their caches on the meta device."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForImageTextToText

import planner
from planner import ConfigError
from planner.activations import peak
from planner.huggingface.multimodal import TOWERS
from planner.program import Dims
from planner.runtimes.transformers import Transformers
from planner.runtimes.transformers_code.forward import pass_program
from planner.runtimes.transformers_code.regime import Pass, Regime
from profiles.meters import LiveTensorMeter
from tests.planner.oracle import assert_exact, assert_same_parameters, live_model
from tests.properties import examples

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "vocab_size": 30, "pad_token_id": 0}
IMAGES: dict[str, Any] = {**SIZES, "hidden_size": 16, "image_size": 24, "patch_size": 4}
CLIP, SIGLIP = ({**IMAGES, "model_type": f"{kind}_vision_model"} for kind in ("clip", "siglip"))
PIXTRAL = {**IMAGES, "model_type": "pixtral"}
QWEN_IMAGES: dict[str, Any] = {
    "depth": 2,
    "num_heads": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "out_hidden_size": 32,
    "patch_size": 4,
}
MROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}
OWN: dict[str, dict[str, Any]] = {
    "llava": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": CLIP},
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "head_dim": 12},
        "vision_config": PIXTRAL,
    },
    "gemma3": {
        "text_config": {**TEXT, "head_dim": 12, "sliding_window": 4},
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 4,
    },
    "llama4": {
        "text_config": {
            **TEXT,
            "head_dim": 8,
            "num_local_experts": 3,
            "intermediate_size_mlp": 20,
            "attention_chunk_size": 4,
        },
        "vision_config": {
            **IMAGES,
            "vision_output_dim": 10,
            "projector_input_dim": 6,
            "projector_output_dim": 10,
        },
    },
    "qwen2_vl": {
        **TEXT,
        "rope_scaling": MROPE,
        "vision_config": {"embed_dim": 16, "depth": 2, "num_heads": 2, "hidden_size": 32},
    },
    "qwen2_5_vl": {**TEXT, "rope_scaling": MROPE, "vision_config": QWEN_IMAGES},
    "qwen3_vl": {
        "text_config": {**TEXT, "head_dim": 12},
        "vision_config": {**QWEN_IMAGES, "num_position_embeddings": 25},
    },
    "qwen3_vl_moe": {
        "text_config": {**TEXT, "num_experts": 4, "num_experts_per_tok": 2},
        "vision_config": {**QWEN_IMAGES, "deepstack_visual_indexes": [1]},
    },
}
STEMS = {
    "gemma3": "Gemma3",
    "llava": "Llava",
    "mistral3": "Mistral3",
    "qwen2_5_vl": "Qwen2_5_VL",
    "qwen2_vl": "Qwen2VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe",
}


def text(kind: str, **change: Any) -> dict[str, Any]:
    return {"text_config": {**OWN[kind]["text_config"], **change}}


def vision(kind: str, **change: Any) -> dict[str, Any]:
    return {"vision_config": {**OWN[kind]["vision_config"], **change}}


def llava_of(model_type: str, **change: Any) -> tuple[str, dict[str, Any]]:
    return "llava", {"text_config": {**TEXT, "model_type": model_type, **change}}


ABSENT = object()
NESTED = {
    "rope_scaling": ABSENT,
    "text_config": {**TEXT, "rope_scaling": MROPE, "tie_word_embeddings": True},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in OWN),
    *((kind, {"tie_word_embeddings": True}) for kind in OWN),
    *((kind, {"tie_word_embeddings": False}) for kind in OWN),
    ("llava", text("llava", tie_word_embeddings=True)),
    ("llava", text("llava", architectures=["LlamaForCausalLM"], torch_dtype="float16")),
    ("llava", {"vision_feature_layer": [-2, -1, 0], "multimodal_projector_bias": False}),
    ("llava", {"vision_config": SIGLIP, "vision_feature_select_strategy": "full"}),
    ("llava", {"vision_config": {**SIGLIP, "vision_use_head": False}}),
    ("llava", {"vision_config": PIXTRAL, "vision_feature_layer": -1}),
    ("llava", {"text_config": {k: v for k, v in TEXT.items() if k != "model_type"}}),
    llava_of("mistral", head_dim=12, sliding_window=4),
    llava_of("qwen2"),
    llava_of("qwen3", head_dim=8),
    llava_of("gemma", head_dim=8),
    llava_of("gemma2", head_dim=8, sliding_window=4),
    llava_of("mixtral", num_local_experts=3),
    llava_of("phi", num_key_value_heads=4),
    llava_of("cohere", use_qk_norm=True),
    llava_of("gpt_neox"),
    llava_of("falcon", tie_word_embeddings=False),
    ("mistral3", {"spatial_merge_size": 3, "multimodal_projector_bias": True}),
    ("mistral3", {"vision_feature_layer": [0, 1], **text("mistral3", tie_word_embeddings=False)}),
    ("mistral3", vision("mistral3", rope_theta=5.0, head_dim=4, patch_size=[4, 5])),
    ("mistral3", {"text_config": {**TEXT, "model_type": "llama"}}),
    ("gemma3", vision("gemma3", vision_use_head=False)),
    ("gemma3", text("gemma3", tie_word_embeddings=False, model_type="gemma3_text")),
    (
        "gemma3",
        text(
            "gemma3",
            rope_local_base_freq=1e4,
            rope_theta=1e6,
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
            sliding_window_pattern=2,
        ),
    ),
    ("gemma3", {**text("gemma3", layer_types=["full_attention"] * 2), "hidden_size": 77}),
    ("gemma3", {"vision_config": CLIP, "tie_word_embeddings": None}),
    ("llama4", text("llama4", tie_word_embeddings=True, use_qk_norm=False)),
    ("llama4", text("llama4", interleave_moe_layer_step=2, attention_bias=True)),
    ("llama4", vision("llama4", num_attention_heads=3, num_channels=1)),
    ("qwen2_vl", vision("qwen2_vl", mlp_ratio=3, in_channels=1, spatial_merge_size=1)),
    ("qwen2_vl", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen2_5_vl", {**NESTED, "vocab_size": 77}),
    ("qwen2_vl", NESTED),
    ("qwen2_5_vl", {"head_dim": 12, "sliding_window": 4, "num_key_value_heads": None}),
    ("qwen2_5_vl", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ("qwen2_5_vl", vision("qwen2_5_vl", model_type="qwen2_5_vl", in_chans=1, window_size=8)),
    ("qwen2_5_vl", vision("qwen2_5_vl", num_hidden_layers=1, temporal_patch_size=1)),
    ("qwen3_vl", text("qwen3_vl", tie_word_embeddings=True, attention_bias=True)),
    ("qwen3_vl", text("qwen3_vl", sliding_window=4, num_key_value_heads=None)),
    ("qwen3_vl", vision("qwen3_vl", deepstack_visual_indexes=[0, 1], model_type="qwen3_vl")),
    (
        "qwen3_vl",
        text("qwen3_vl", rope_scaling={"rope_type": "default", "mrope_section": [2, 1, 1]}),
    ),
    ("qwen3_vl", vision("qwen3_vl", head_dim=12, in_channels=1)),
    ("qwen3_vl_moe", text("qwen3_vl_moe", mlp_only_layers=[0], head_dim=12)),
    ("qwen3_vl_moe", text("qwen3_vl_moe", decoder_sparse_step=2, norm_topk_prob=False)),
]
by_variant = pytest.mark.parametrize(
    ("kind", "change"), VARIANTS, ids=[f"{i} {kind}" for i, (kind, _) in enumerate(VARIANTS)]
)


def config_of(kind: str, **change: Any) -> dict[str, Any]:
    config = {"model_type": kind, **OWN[kind], **change}
    return {name: value for name, value in config.items() if value is not ABSENT}


@by_variant
def test_parameters_and_caches_are_those_of_the_class(kind, change):
    assert_exact(config_of(kind, **change), auto="image_text", tokens=(2, 7))


@by_variant
def test_tensors_that_are_not_trained_are_counted_with_the_weights(kind, change):
    config = config_of(kind, **change)
    live = live_model(config, auto="image_text")
    rows = Transformers().buffer_rows(planner.read_config(config), dtype="bf16")
    held = {id(b): b.numel() * b.element_size() for b in live.buffers()}
    assert sum(row.size_bytes for row in rows) == sum(held.values())


@pytest.mark.parametrize("kind", STEMS)
def test_the_bare_model_of_a_wrapper_has_no_head(kind):
    config = config_of(kind, architectures=[f"{STEMS[kind]}Model"])
    assert_same_parameters(planner.read_config(config), live_model(config))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama4_vision_model", "Llama4VisionModel"),
        ("pixtral", "PixtralVisionModel"),
        ("qwen2_5_vl_vision", "Qwen2_5_VisionTransformerPretrainedModel"),
        ("qwen3_vl_moe_vision", "Qwen3VLMoeVisionModel"),
        ("qwen3_vl_vision", "Qwen3VLVisionModel"),
    ],
)
def test_towers_are_read_alone_too(kind, name):
    config = {"model_type": kind}
    live = live_model({**config, "architectures": [name]})
    assert_same_parameters(planner.read_config(config), live)


@pytest.mark.parametrize("kind", OWN)
def test_absent_fields_take_the_defaults_of_their_class(kind):
    """With few layers; a published text_config may name only those."""
    config: dict[str, Any] = {"model_type": kind, "text_config": {"num_hidden_layers": 2}}
    assert_same_parameters(planner.read_config(config), live_model(config, auto="image_text"))


@pytest.mark.parametrize("kind", sorted(set(OWN) - {"llama4"}))
def test_absent_parts_take_what_their_wrapper_says(kind):
    config: dict[str, Any] = {"model_type": kind, "text_config": None}
    live = live_model(config, auto="image_text")
    assert_same_parameters(planner.read_config(config), live)


@given(data=st.data())
@examples(40)
def test_random_configs_have_the_parameters_and_caches_of_their_class(data):
    draw = data.draw
    kind, flag, tokens = draw(st.sampled_from(sorted(OWN))), st.booleans(), draw(st.integers(1, 12))
    config = random_config(draw, kind, flag)
    assert_exact(config, auto="image_text", tokens=(tokens,), static=tokens > 1)


def random_config(draw: Any, kind: str, flag: Any) -> dict[str, Any]:
    qwen, size = kind.startswith("qwen"), st.integers(1, 30)
    kv_heads = draw(st.integers(1, 3))
    heads, width = kv_heads * draw(st.integers(1, 3)), 4 * draw(st.integers(1, 4))
    words = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": heads,
        "hidden_size": heads * width,
        "head_dim": width if kind.startswith("qwen2") else 2 * draw(st.integers(1, 9)),
        "intermediate_size": draw(size),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "vocab_size": draw(size),
        "tie_word_embeddings": draw(flag),
        "attention_bias": draw(flag),
        "mlp_bias": draw(flag),
        "sliding_window": draw(st.integers(2, 9)),
        "attention_chunk_size": draw(st.integers(2, 9)),
        "use_sliding_window": draw(flag),
        "max_window_layers": draw(st.integers(0, 3)),
        "interleave_moe_layer_step": draw(st.integers(1, 3)),
        "decoder_sparse_step": draw(st.integers(1, 3)),
        "moe_intermediate_size": draw(size),
    }
    if kind.startswith("qwen2"):
        first = draw(st.integers(0, width // 2))
        words["rope_scaling"] = {"type": "mrope", "mrope_section": [first, 0, width // 2 - first]}
    if kind == "llava":
        words["model_type"] = draw(st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "gemma"]))
        if words["model_type"] == "llama":
            del words["head_dim"]
    across, deep = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    pictures = {
        "num_attention_heads": across,
        "num_hidden_layers": deep,
        "hidden_size": across * 4 * draw(st.integers(1, 5)),
        "intermediate_size": draw(size),
        "image_size": draw(st.integers(8, 40)),
        "patch_size": draw(st.integers(1, 8)),
        "vision_use_head": draw(flag),
    }
    if qwen:
        pictures["num_heads"] = pictures.pop("num_attention_heads")
        pictures["depth"] = pictures.pop("num_hidden_layers")
        pictures["embed_dim"] = pictures["hidden_size"]
        pictures["out_hidden_size"] = draw(size)
        pictures["spatial_merge_size"] = draw(st.integers(1, 3))
        pictures["num_position_embeddings"] = draw(size)
        pictures["deepstack_visual_indexes"] = [0] * draw(st.integers(0, 3))
    if kind == "llava":
        pictures["model_type"] = draw(st.sampled_from(sorted(TOWERS)))
    whole = {
        "spatial_merge_size": draw(st.integers(1, 3)),
        "multimodal_projector_bias": draw(flag),
        "tie_word_embeddings": draw(flag),
        "vision_feature_layer": draw(st.sampled_from([-1, -2, [0], [-1, 0]])),
    }
    own = OWN[kind]
    whole["vision_config"] = {**own["vision_config"], **pictures}
    if kind.startswith("qwen2"):
        whole["tie_word_embeddings"] = words.pop("tie_word_embeddings")
        return config_of(kind, **{**words, **whole})
    return config_of(kind, **whole, text_config={**own["text_config"], **words})


def test_text_images_and_projector_are_counted_apart():
    config = config_of("llava")
    model, live = planner.read_config(config), live_model(config, auto="image_text")
    groups = model.parameter_groups()
    parts = {"vision": live.model.vision_tower, "projector": live.model.multi_modal_projector}
    for group, module in parts.items():
        assert groups[group][1] == sum(p.numel() for p in module.parameters())
    table = model.parameter_table()
    text = table[table["name"].str.contains("language_model|lm_head")]
    assert not set(text["group"]) & set(parts)
    assert text["count"].sum() == planner.read_config(config["text_config"]).parameter_count


def test_a_wrapper_says_its_type_that_of_its_text_and_all_defaults():
    model = planner.read_config({"model_type": "gemma3", "text_config": {"num_hidden_layers": 2}})
    assert (model.model_type, model.text_type) == ("gemma3", "gemma3_text")
    assert model.config["text_config"] == {"num_hidden_layers": 2}
    for default in ("text_config.head_dim=256", "vision_config.patch_size=16", "dtype=float32"):
        assert default in model.defaults
    assert "text_config.dtype=float32" not in model.defaults


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        ({"torch_dtype": "float16", **text("llava", torch_dtype="float32")}, "fp16"),
        (text("llava", dtype="bfloat16"), "bf16"),
        ({"dtype": None, "torch_dtype": "bfloat16"}, "bf16"),
    ],
)
def test_the_dtype_is_that_of_the_whole_or_else_of_the_text(change, dtype):
    assert planner.read_config(config_of("llava", **change)).dtype == dtype


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("llava", {"architectures": ["LlavaOne"]}, r"architectures\[0\]='LlavaOne'"),
        ("llava", {"text_config": 3}, "text_config=3 is not allowed"),
        ("llava", text("llava", model_type="bert"), "text_config: model_type='bert' is not read"),
        ("llava", text("llava", model_type="lama"), "text_config.model_type='lama' is not read"),
        ("llava", text("llava", hidden_size=-1), "^text_config: hidden_size=-1 is not allowed"),
        ("llava", text("llava", model_type="vit"), "^text_config: .*inside another"),
        ("llava", vision("llava", model_type="vit"), "vision_config.model_type='vit'"),
        ("llava", vision("llava", patch_size=0), "^vision_config: patch_size=0 is not"),
        ("llava", {"vision_feature_layer": []}, r"vision_feature_layer=\[\] is not allowed"),
        ("llava", {"projector_hidden_act": "no"}, "projector_hidden_act='no' is not"),
        ("llava", {"vision_feature_select_strategy": "a"}, "select_strategy='a' is not"),
        ("llava", text("llava", model_type="falcon"), "tie_word_embeddings=True is not allowed"),
        ("mistral3", {"spatial_merge_size": 0}, "spatial_merge_size=0 is not allowed"),
        ("mistral3", vision("mistral3", rope_parameters={"rope_type": "yarn"}), "rope_type='yarn'"),
        (
            "mistral3",
            {"text_config": {**TEXT, "model_type": "gpt_neox"}},
            "rms_norm_eps is missing",
        ),
        ("gemma3", {"vision_config": PIXTRAL}, "vision_config.model_type='pixtral'"),
        ("gemma3", {"mm_tokens_per_image": None}, "mm_tokens_per_image is missing"),
        ("llama4", {"architectures": ["Llama4ForCausalLM"]}, r"architectures\[0\]="),
        ("llama4", vision("llama4", image_size=[24, 24]), "image_size=.* for squares"),
        ("qwen2_5_vl", {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "three whole"),
        ("qwen2_5_vl", {"rope_scaling": None}, r"mrope_section=\[16, 24, 24\] is not .*head_dim=8"),
        ("qwen2_5_vl", {"num_attention_heads": 5}, "num_attention_heads=5"),
        ("qwen3_vl", vision("qwen3_vl", deepstack_visual_indexes=None), "deepstack_visual_indexes"),
        ("qwen3_vl", text("qwen3_vl", head_dim=None), "^text_config: head_dim is missing"),
        ("qwen3_vl", text("qwen3_vl", rope_scaling={"type": "mrope"}), "rope_type='mrope'"),
        ("qwen3_vl_moe", text("qwen3_vl_moe", num_experts_per_tok=9), "num_experts_per_tok=9"),
    ],
)
def test_a_value_that_is_not_read_is_refused_by_name(kind, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        planner.read_config(config_of(kind, **change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llava", "mistral3"])
def test_without_images_a_forward_peaks_where_that_of_its_language_model_does(kind, attention):
    config = config_of(kind)
    described = AutoConfig.for_model(**deepcopy(config))
    live = AutoModelForImageTextToText.from_config(
        described, dtype=torch.bfloat16, attn_implementation=attention
    )
    ids = torch.zeros(2, 50, dtype=torch.long)
    with torch.no_grad(), LiveTensorMeter() as meter:
        held = live.eval()(input_ids=ids, use_cache=True)
    assert held.past_key_values is not None
    how = Pass(kind="prefill", attention=attention, dtype="bf16", device="cpu")
    model, dims = planner.read_config(config), Dims(batch=2, tokens=50, context=50)
    program = pass_program(model, how, Regime.of(model, dims))
    assert peak(program, dims).live_bytes == meter.peak_bytes
