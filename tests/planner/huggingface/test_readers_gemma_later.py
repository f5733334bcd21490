"""Oracle: the live classes of gemma3n and gemma4, alone and with images and sound beside them."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest
import transformers.masking_utils
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from planner.layers import RoPE
from tests.planner.oracle import assert_exact, assert_same_parameters, live_model
from tests.properties import examples

FULL, SLIDING = "full_attention", "sliding_attention"
TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "vocab_size_per_layer_input": 38,
    "hidden_size_per_layer_input": 6,
    "sliding_window": 8,
    "layer_types": [SLIDING, FULL] * 3,
}
GEMMA4: dict[str, Any] = {**TEXT, "global_head_dim": 16}
MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 5}
VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 9,
}
AUDIO: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "output_proj_dims": 12,
    "subsampling_conv_channels": [8, 4],
}
PATCHES = {"patch_size": 2, "mm_embed_dim": 12, "output_proj_dims": 12, "mm_posemb_size": 5}
OWN: dict[str, dict[str, Any]] = {
    "gemma3n_text": {**TEXT, "num_kv_shared_layers": 2, "laurel_rank": 3},
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "gemma4": {"text_config": GEMMA4, "vision_config": VISION, "audio_config": AUDIO},
    "gemma4_unified": {
        "text_config": GEMMA4,
        "vision_config": PATCHES,
        "audio_config": {"audio_embed_dim": 7},
    },
}
SHARED = {"num_kv_shared_layers": 2}
SAVED_HEADS = {f"0{i}": {"head_dim": 24, "num_key_value_heads": 4} for i in (1, 3, 5)}
LINEAR = {"rope_type": "linear", "factor": 2.0}
SAME_ROPE = {kind: {"rope_theta": 5.0} for kind in (FULL, SLIDING)}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in OWN),
    ("gemma3n_text", {"num_kv_shared_layers": 4, "tie_word_embeddings": False}),
    ("gemma3n_text", {"num_kv_shared_layers": 0, "layer_types": None}),
    ("gemma3n_text", {"intermediate_size": [8, 9, 10, 11, 12, 13], "attention_bias": True}),
    ("gemma3n_text", {"altup_num_inputs": 1, "architectures": ["Gemma3nTextModel"]}),
    ("gemma3n_text", {"layer_types": [SLIDING] * 6, "activation_sparsity_pattern": [0.5] * 6}),
    ("gemma3n_text", {"hidden_size_per_layer_input": 0, "laurel_rank": 0}),
    ("gemma3n_text", {"rope_scaling": LINEAR, "rope_theta": 7.0, "rope_local_base_freq": 3.0}),
    ("gemma4_text", {"layer_types": None}),
    ("gemma4_text", {"layer_types": [FULL] * 5 + [SLIDING]}),
    ("gemma4_text", {**SHARED, "use_double_wide_mlp": True}),
    ("gemma4_text", {**SHARED, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("gemma4_text", {"attention_k_eq_v": True, "attention_bias": True}),
    ("gemma4_text", {"num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0}),
    ("gemma4_text", {**MOE, "hidden_size_per_layer_input": 0}),
    ("gemma4_text", {**MOE, **SHARED, "use_double_wide_mlp": True, "top_k_experts": 1}),
    ("gemma4_text", {"use_bidirectional_attention": "all", "tie_word_embeddings": False}),
    ("gemma4_text", {"use_bidirectional_attention": "vision", "rope_parameters": SAME_ROPE}),
    ("gemma4_text", {"per_layer_config": SAVED_HEADS}),
    ("gemma4_text", {"per_layer_config": None, "architectures": ["Gemma4TextModel"]}),
    ("gemma4_text", {"rope_parameters": {FULL: {**LINEAR, "rope_theta": 5.0}, **SAME_ROPE}}),
    ("gemma4_unified_text", {**SHARED, "use_double_wide_mlp": True}),
    ("gemma4_unified_text", {"attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("gemma4_unified_text", {**MOE, "use_bidirectional_attention": "all"}),
    ("gemma4_unified_text", {"architectures": ["Gemma4UnifiedTextModel"]}),
    ("gemma4", {"tie_word_embeddings": False}),
    ("gemma4", {"text_config": {**GEMMA4, "tie_word_embeddings": False}}),
    ("gemma4", {"vision_config": None, "text_config": {**GEMMA4, **MOE, **SHARED}}),
    ("gemma4", {"audio_config": None, "vision_config": {**VISION, "attention_bias": True}}),
    ("gemma4", {"vision_config": {**VISION, "use_clipped_linears": True, "standardize": True}}),
    ("gemma4", {"architectures": ["Gemma4Model"]}),
    ("gemma4_unified", {"tie_word_embeddings": False, "audio_config": {"hidden_size": 9}}),
    ("gemma4_unified", {"audio_config": None, "vision_config": {**PATCHES, "patch_size": 1}}),
    ("gemma4_unified", {"vision_config": None, "architectures": ["Gemma4UnifiedModel"]}),
]


@pytest.fixture(autouse=True, scope="module")
def no_packed_sequences():
    """The wrappers look at values of the positions, which the meta device does not have."""
    with pytest.MonkeyPatch.context() as patch:
        module = transformers.masking_utils
        patch.setattr(module, "find_packed_sequence_indices", lambda positions: None)
        yield


def config_of(kind: str, **change: Any) -> dict[str, Any]:
    return {"model_type": kind, **OWN[kind], **change}


def auto_of(kind: str) -> str:
    return "causal" if kind.endswith("text") else "image_text"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(
    ("kind", "change"), VARIANTS, ids=[f"{i} {kind}" for i, (kind, _) in enumerate(VARIANTS)]
)
def test_parameters_and_caches_are_those_of_the_class(kind, change):
    assert_exact(config_of(kind, **change), auto=auto_of(kind), tokens=(2, 12))


@pytest.mark.parametrize("kind", OWN)
def test_absent_fields_take_the_defaults_of_their_class(kind):
    few = {"num_hidden_layers": 6}
    config: dict[str, Any] = {"model_type": kind, **few}
    if not kind.endswith("text"):
        parts = {f"{name}_config": {} for name in ("vision", "audio")}
        config = {"model_type": kind, "text_config": few, **parts}
    if kind == "gemma3n_text":
        config |= {"num_hidden_layers": 20}  # 15 of them share caches
    assert_same_parameters(planner.read_config(config), live_model(config, auto=auto_of(kind)))


LARGE = {
    "model_type": "gemma4",
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 72,
    },
}
K_EQ_V = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "sliding_window": 1024}
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "E2B": (
        5_104_297_504,
        {
            "model_type": "gemma4",
            "vision_config": {},
            "audio_config": {},
            "text_config": {
                "hidden_size": 1536,
                "intermediate_size": 6144,
                "num_hidden_layers": 35,
                "num_key_value_heads": 1,
                "num_kv_shared_layers": 20,
                "use_double_wide_mlp": True,
                "layer_types": ([SLIDING] * 4 + [FULL]) * 7,
            },
        },
    ),
    "26B-A4B": (
        25_805_933_872,
        {
            **LARGE,
            "text_config": {
                **K_EQ_V,
                "hidden_size": 2816,
                "intermediate_size": 2112,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "num_global_key_value_heads": 2,
                "enable_moe_block": True,
                "num_experts": 128,
                "top_k_experts": 8,
                "moe_intermediate_size": 704,
            },
        },
    ),
    "31B": (
        31_273_086_512,
        {
            **LARGE,
            "text_config": {
                **K_EQ_V,
                "hidden_size": 5376,
                "intermediate_size": 21504,
                "num_hidden_layers": 60,
                "num_attention_heads": 32,
                "num_key_value_heads": 16,
                "num_global_key_value_heads": 4,
            },
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_sizes_are_those_of_the_class(name):
    count, config = PUBLISHED[name]
    assert planner.read_config(config).parameter_count == count
    assert_exact(config, auto="image_text", tokens=(2000,), static=False)


def test_a_wrapper_without_parts_is_its_text_model():
    model = planner.read_config({"model_type": "gemma4"})
    assert_same_parameters(model, live_model({"model_type": "gemma4"}, auto="image_text"))
    assert (model.towers, model.model_type, model.text_type) == ((), "gemma4", "gemma4_text")


@pytest.mark.parametrize(
    ("kind", "change"), [("gemma3n_text", {}), *((k, c) for k, c in VARIANTS if k == "gemma4")]
)
def test_a_config_that_transformers_saved_is_read_like_the_one_it_read(kind, change):
    config = config_of(kind, **change)
    saved = live_model(config, auto=auto_of(kind)).config.to_json_string(use_diff=False)
    again = planner.read_config({**json.loads(saved), "architectures": change.get("architectures")})
    model = planner.read_config(config)
    assert list(again.checkpoint_parameters()) == list(model.checkpoint_parameters())
    assert again.layers == model.layers


@pytest.mark.parametrize("kind", ["gemma3n_text", "gemma4_text", "gemma4_unified_text"])
@pytest.mark.parametrize("rope_parameters", [None, SAME_ROPE])
def test_positions_of_each_kind_of_layer_are_those_of_the_class(kind, rope_parameters):
    config = config_of(kind, rope_parameters=rope_parameters)
    model, live = planner.read_config(config), live_model(config)
    for ours, name in ((model.positions, FULL), (model.local_positions, SLIDING)):
        assert isinstance(ours, RoPE)
        assert ours.rotary_dim == 2 * getattr(live.model.rotary_emb, f"{name}_inv_freq").numel()
        theirs = live.config.rope_parameters[name]
        assert (ours.rope_theta, ours.rope_type) == (theirs["rope_theta"], theirs["rope_type"])
        part = theirs.get("partial_rotary_factor")
        assert dict(ours.scaling).get("partial_rotary_factor") == part


@st.composite
def text_configs(draw, kind: str) -> dict[str, Any]:
    flag, small = st.booleans(), st.integers(1, 9)
    kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    heads = kv_heads * draw(st.integers(1, 3))
    kinds = draw(st.lists(st.sampled_from([FULL, SLIDING]), min_size=layers, max_size=layers))
    if kind != "gemma3n_text":
        kinds[-1] = FULL
    most = max((n for n in range(layers) if set(kinds[: layers - n]) == set(kinds)), default=0)
    per_layer = draw(small) if kind == "gemma3n_text" else draw(st.integers(0, 5))
    config: dict[str, Any] = {
        "vocab_size": draw(st.integers(2, 60)),
        "vocab_size_per_layer_input": draw(st.integers(2, 60)),
        "hidden_size": heads * draw(small),
        "intermediate_size": draw(small),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * draw(st.integers(1, 6)),
        "layer_types": kinds,
        "num_kv_shared_layers": draw(st.integers(0, most)),
        "hidden_size_per_layer_input": per_layer,
        "sliding_window": draw(st.integers(1, 12)),
        "attention_bias": draw(flag),
        "tie_word_embeddings": draw(flag),
    }
    if kind == "gemma3n_text":
        widths = st.lists(small, min_size=layers, max_size=layers)
        return {
            **config,
            "intermediate_size": draw(st.one_of(small, widths)),
            "laurel_rank": draw(small),
            "altup_num_inputs": draw(st.integers(1, 4)),
        }
    if kind == "gemma4_text" and not per_layer:
        config["num_kv_shared_layers"] = 0
    if kind == "gemma4_text" and draw(flag):
        experts = draw(st.integers(1, 4))
        config |= {**MOE, "num_experts": experts, "top_k_experts": draw(st.integers(1, experts))}
    return {
        **config,
        "global_head_dim": 2 * draw(st.integers(1, 6)),
        "num_global_key_value_heads": draw(st.sampled_from([None, 1, heads])),
        "attention_k_eq_v": draw(flag),
        "use_double_wide_mlp": draw(flag),
        "use_bidirectional_attention": draw(st.sampled_from([None, "all", "vision"])),
    }


@st.composite
def parts(draw, kind: str) -> dict[str, Any]:
    small = st.integers(1, 9)
    if kind == "gemma4_unified":
        width = draw(small)
        vision: dict[str, Any] = {**PATCHES, "mm_embed_dim": width, "output_proj_dims": width}
        vision |= {"patch_size": draw(st.integers(1, 3)), "mm_posemb_size": draw(small)}
        audio: dict[str, Any] = {"audio_embed_dim": draw(small)}
    else:
        kv_heads = draw(st.integers(1, 3))
        vision = {name: draw(small) for name in VISION}
        vision |= {"num_hidden_layers": draw(st.integers(1, 3)), "head_dim": 4 * draw(small)}
        vision |= {"num_key_value_heads": kv_heads, "num_attention_heads": 2 * kv_heads}
        heads = draw(st.integers(1, 3))
        audio = {"hidden_size": heads * draw(small), "num_attention_heads": heads}
        audio |= {"num_hidden_layers": draw(st.integers(1, 3)), "output_proj_dims": draw(small)}
        audio |= {"subsampling_conv_channels": [4 + draw(small), draw(small)]}
        audio |= {"conv_kernel_size": draw(st.integers(1, 5))}
    return {
        "vision_config": draw(st.sampled_from([None, vision])),
        "audio_config": draw(st.sampled_from([None, audio])),
        "tie_word_embeddings": draw(st.booleans()),
    }


@given(data=st.data())
@examples(30)
def test_random_configs_are_those_of_their_class(data):
    kind = data.draw(st.sampled_from(list(OWN)))
    config = {"model_type": kind}
    if kind.endswith("text"):
        config |= data.draw(text_configs(kind))
    else:
        config |= {"text_config": data.draw(text_configs(f"{kind}_text")), **data.draw(parts(kind))}
    tokens = data.draw(st.integers(1, 15))
    static = tokens > 1 and data.draw(st.booleans())
    assert_exact(config, auto=auto_of(kind), tokens=(tokens,), static=static)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma3n_text", {"num_kv_shared_layers": 6}, "num_kv_shared_layers=6 .* no earlier one of"),
    ("gemma3n_text", {"num_kv_shared_layers": 5}, "no earlier one of full_attention keeps"),
    ("gemma3n_text", {"num_kv_shared_layers": -1}, "num_kv_shared_layers=-1 is not allowed"),
    ("gemma3n_text", {"intermediate_size": [3, 4]}, r"intermediate_size=\[3, 4\] .* a list of 6"),
    ("gemma3n_text", {"layer_types": ["chunked_attention"] * 6}, "has 'chunked_attention'"),
    ("gemma3n_text", {"layer_types": [FULL]}, "layer_types=.* a list of 6 words"),
    ("gemma3n_text", {"final_logit_softcapping": None}, "final_logit_softcapping is missing"),
    ("gemma3n_text", {"activation_sparsity_pattern": 0.5}, "pattern=0.5 .* a list of 6 shares"),
    ("gemma3n_text", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
    ("gemma3n_text", {"head_dim": 7}, "head_dim=7 gives 7 rotary dimensions"),
    ("gemma3n_text", {"head_dim": None}, "head_dim is missing"),
    ("gemma3n_text", {"hidden_size": 30}, "hidden_size=30 is not a multiple"),
    ("gemma3n_text", {"pad_token_id": 38}, "pad_token_id=38 is not allowed: .* -38 to 37"),
    ("gemma3n_text", {"altup_coef_clip": None}, "altup_coef_clip is missing"),
    ("gemma3n_text", {"altup_correct_scale": "yes"}, "altup_correct_scale='yes' is not allowed"),
    ("gemma3n_text", {"altup_active_idx": 4}, "altup_active_idx=4 is not allowed: .* -4 to 3"),
    ("gemma3n_text", {"architectures": ["Other"]}, r"architectures\[0\]='Other'"),
    (
        "gemma3n_text",
        {"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5 is not allowed",
    ),
    (
        "gemma3n_text",
        {"per_layer_config": {"0": {"num_key_value_heads": 4}}},
        "per_layer_config is not read",
    ),
    ("gemma4_text", {"global_head_dim": None}, "global_head_dim is missing"),
    ("gemma4_text", {"global_head_dim": 7}, "head_dim=7 gives 7 rotary dimensions"),
    ("gemma4_text", {**SHARED, "hidden_size_per_layer_input": 0}, "num_kv_shared_layers=2 .* fail"),
    ("gemma4_text", {"hidden_size_per_layer_input": None}, "hidden_size_per_layer_input is missi"),
    ("gemma4_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma4_text", {"enable_moe_block": True}, "num_experts is missing"),
    ("gemma4_text", {**MOE, "top_k_experts": 5}, "num_experts_per_tok=5 is more than"),
    (
        "gemma4_text",
        {"attention_k_eq_v": True, "num_global_key_value_heads": 3},
        "not a multiple of num_key_value_heads=3",
    ),
    ("gemma4_text", {"rope_parameters": {"rope_theta": 5.0}}, "sliding_attention in it is an obj"),
    ("gemma4_text", {"rope_parameters": {FULL: SAME_ROPE[FULL]}}, "sliding_attention in it is"),
    (
        "gemma4_text",
        {"rope_parameters": {**SAME_ROPE, FULL: {**LINEAR, "rope_type": "yarn", "rope_theta": 5}}},
        "original_max_position_embeddings is missing",
    ),
    (
        "gemma4_text",
        {
            "rope_parameters": {
                **SAME_ROPE,
                FULL: {**LINEAR, "rope_theta": 5.0, "partial_rotary_factor": 0.5},
            }
        },
        "partial_rotary_factor=0.5 of full_attention is not allowed",
    ),
    ("gemma4_text", {"rope_scaling": None}, "rope_scaling=None is not allowed: rope_parameters"),
    ("gemma4_text", {"per_layer_config": []}, r"per_layer_config=\[\] is not allowed"),
    ("gemma4_text", {"per_layer_config": {"1": {"head_dim": 4}}}, "layer 1 unlike the last full_"),
    ("gemma4_text", {"per_layer_config": {"9": {"head_dim": 4}}}, "per_layer_config has '9'"),
    ("gemma4", {"architectures": ["Gemma4ForCausalLM"]}, r"architectures\[0\]='Gemma4ForCausalLM'"),
    ("gemma4", {"text_config": 3}, "text_config=3 is not allowed: an object or null"),
    ("gemma4", {"text_config": {**GEMMA4, "head_dim": "8"}}, "text_config: head_dim='8' is not"),
    ("gemma4", {"vision_config": []}, r"vision_config=\[\] is not allowed: an object or null"),
    (
        "gemma4",
        {"vision_config": {**VISION, "head_dim": 6}},
        "vision_config: head_dim=6 is not a m",
    ),
    (
        "gemma4",
        {"vision_config": {**VISION, "output_proj_dims": 9}},
        "output_proj_dims=9 .*=24 c",
    ),
    (
        "gemma4",
        {"audio_config": {"subsampling_conv_channels": [8]}},
        r"channels=\[8\] .* of two",
    ),
    ("gemma4", {"audio_config": {**AUDIO, "num_attention_heads": 3}}, "is not a multiple of num_"),
    (
        "gemma4",
        {"vision_config": {**VISION, "rope_parameters": {"rope_type": "linear"}}},
        "vision_config: rope_parameters.rope_type='linear' is not allowed",
    ),
    (
        "gemma4_unified",
        {"vision_config": {**PATCHES, "model_patch_size": 48}},
        "model_patch_size=48 is not allowed: .* is 6",
    ),
    (
        "gemma4_unified",
        {"audio_config": {"hidden_size": 3, "output_proj_dims": 4}},
        "audio_config: .* is not allowed: they are one field",
    ),
]


@pytest.mark.parametrize(
    ("kind", "change", "message"), REFUSED, ids=[f"{i} {case[0]}" for i, case in enumerate(REFUSED)]
)
def test_impossible_values_are_named(kind, change, message):
    with pytest.raises(ConfigError, match=message):
        planner.read_config(config_of(kind, **change))


def test_gemma3n_with_images_is_refused_where_transformers_cannot_build_it_either():
    config = {"model_type": "gemma3n", "vision_config": {"architecture": "mobilenetv5_300m_enc"}}
    with pytest.raises(ConfigError, match=r"mobilenetv5_300m_enc.* the timm package builds it"):
        planner.read_config(config)
    if importlib.util.find_spec("timm") is None:
        with pytest.raises(ImportError, match="timm"):
            live_model(config, auto="image_text", device="meta")


def test_what_each_part_weighs_is_told_apart():
    groups = planner.read_config(config_of("gemma4")).parameter_groups()
    live = dict(live_model(config_of("gemma4"), auto="image_text").named_parameters())
    words = {"vision": "vision_tower.", "audio": "audio_tower.", "projector": ".embedding_proj"}
    for part, word in words.items():
        assert groups[part][1] == sum(p.numel() for name, p in live.items() if word in name)


@pytest.mark.parametrize(
    ("kind", "change", "part"),
    [
        ("gemma3n_text", {}, "blocks with parts of their own"),
        ("gemma4_text", {"hidden_size_per_layer_input": 0}, "normalised values"),
        ("gemma4_unified_text", SHARED, "normalised values"),
    ],
)
def test_activations_of_these_blocks_are_refused_and_not_guessed(kind, change, part):
    work = planner.Inference(batch=1, prompt_tokens=8)
    for runtime in ("transformers", "vllm", "attnlab"):
        deploy = planner.Deployment(gpu="h200", runtime=runtime)
        with pytest.raises(ConfigError, match=part):
            planner.estimate(planner.read_config(config_of(kind, **change)), work, deploy)
