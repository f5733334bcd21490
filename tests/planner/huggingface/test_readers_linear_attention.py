"""Oracle: the live classes of the Qwens and Kimis with linear layers or a vision tower beside."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from planner.huggingface.fields import SAME_AS
from tests.planner.oracle import assert_exact, assert_same_parameters, live_model
from tests.properties import examples

LINEAR, FULL = "linear_attention", "full_attention"
SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
DELTA: dict[str, Any] = {
    **SMALL,
    "head_dim": 16,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": [LINEAR, FULL],
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 10,
}
LATENT: dict[str, Any] = {
    **SMALL,
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
}
DEEPSEEK = {**LATENT, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "rope_theta": 5e4}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 9,
}
KIMI_VISION: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "patch_size": 4,
    "pos_emb_height": 3,
    "pos_emb_width": 5,
}
OWN: dict[str, dict[str, Any]] = {
    "qwen3_next": {**DELTA, **EXPERTS},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS},
    "olmo_hybrid": {k: v for k, v in DELTA.items() if k != "head_dim"},
    "kimi_linear": {
        **LATENT,
        "q_lora_rank": None,
        "num_experts": 8,
        "num_experts_per_token": 2,
        "layer_types": [LINEAR, FULL],
        "linear_num_heads": 3,
        "linear_head_dim": 6,
    },
    "kimi_k2": DEEPSEEK,
    "qwen3_5": {"text_config": DELTA, "vision_config": QWEN_VISION},
    "qwen3_5_moe": {"text_config": {**DELTA, **EXPERTS}, "vision_config": QWEN_VISION},
    "kimi_k25": {
        "text_config": {**DEEPSEEK, "model_type": "kimi_k2"},
        "vision_config": KIMI_VISION,
        "projection_hidden_size": 16,
    },
}
WRAPPERS = ("qwen3_5", "qwen3_5_moe", "kimi_k25")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in OWN),
    ("qwen3_next", {"layer_types": ["mamba", "attention"], "full_attention_interval": None}),
    ("qwen3_next", {"partial_rotary_factor": None, "num_experts": 0}),
    ("qwen3_next", {"layer_types": None, "full_attention_interval": 1, "mlp_only_layers": None}),
    ("qwen3_next", {"architectures": ["Qwen3NextModel"], "attn_output_gate": False}),
    ("qwen3_5_text", {"architectures": ["Qwen3_5TextModel"]}),
    ("qwen3_5_text", {"layer_types": None, "num_hidden_layers": 4, "mtp_num_hidden_layers": 1}),
    ("qwen3_5_moe_text", {"architectures": ["Qwen3_5MoeTextModel"]}),
    ("qwen3_5_moe_text", {"norm_topk_prob": False, "mlp_only_layers": [0]}),
    ("olmo_hybrid", {"hidden_size": 33, "linear_key_head_dim": None}),
    ("olmo_hybrid", {"head_dim": 12, "linear_value_head_dim": None}),
    ("olmo_hybrid", {"rope_parameters": {"rope_theta": None, "rope_type": "default"}}),
    ("olmo_hybrid", {"layer_types": ["attention", "mamba"], "architectures": ["OlmoHybridModel"]}),
    ("kimi_linear", {"tie_word_embeddings": True, "num_key_value_heads": None}),
    ("kimi_linear", {"num_key_value_heads": 3}),
    (
        "kimi_linear",
        {"num_local_experts": 6, "num_experts": 8, "n_group": 4, "attention_bias": True},
    ),
    ("kimi_linear", {"n_group": 4, "num_expert_group": 2, "num_experts_per_tok": 3}),
    ("kimi_linear", {"q_lora_rank": 8, "n_shared_experts": 1, "num_shared_experts": 2}),
    ("kimi_linear", {"linear_attn_config": {"head_dim": 4, "kda_layers": [1]}}),
    ("kimi_k2", {"architectures": ["DeepseekV3ForCausalLM"], "auto_map": {"AutoModel": "x.y"}}),
    ("kimi_k2", {"tie_word_embeddings": True, "q_lora_rank": None}),
    ("qwen3_5", {"tie_word_embeddings": True}),
    ("qwen3_5", {"text_config": {**DELTA, "tie_word_embeddings": True}}),
    ("qwen3_5", {"architectures": ["Qwen3_5Model"], "tie_word_embeddings": True}),
    ("qwen3_5", {"text_config": {**DELTA, "model_type": "llama"}}),
    ("qwen3_5", {"vision_config": {**QWEN_VISION, "num_hidden_layers": 1, "in_channels": 1}}),
    (
        "qwen3_5",
        {"vision_config": {**QWEN_VISION, "spatial_merge_size": 3, "model_type": "qwen3_5"}},
    ),
    ("qwen3_5", {"vision_config": {**QWEN_VISION, "rope_parameters": {"rope_type": "default"}}}),
    ("qwen3_5_moe", {"architectures": ["Qwen3_5MoeModel"]}),
    ("qwen3_5_moe", {"tie_word_embeddings": True}),
    ("kimi_k25", {"tie_word_embeddings": False}),
    ("kimi_k25", {"architectures": ["Kimi_K25Model"]}),
    ("kimi_k25", {"text_config": {**DEEPSEEK, "tie_word_embeddings": False}}),
    ("kimi_k25", {"vision_config": {**KIMI_VISION, "merge_kernel_size": [2, 3]}}),
    ("kimi_k25", {"vision_config": {**KIMI_VISION, "vt_hidden_size": 99, "merge_type": "sd2"}}),
]


def config_of(kind: str, **change: Any) -> dict[str, Any]:
    return {"model_type": kind, **OWN[kind], **change}


def auto_of(kind: str) -> str:
    return "image_text" if kind in WRAPPERS else "causal"


@pytest.mark.parametrize(
    ("kind", "change"), VARIANTS, ids=[f"{i} {kind}" for i, (kind, _) in enumerate(VARIANTS)]
)
def test_parameters_and_caches_are_those_of_the_class(kind, change):
    assert_exact(config_of(kind, **change), auto=auto_of(kind), tokens=(2, 7))


@pytest.mark.parametrize("kind", OWN)
def test_absent_fields_take_the_defaults_of_their_class(kind):
    config: dict[str, Any] = {"model_type": kind, "num_hidden_layers": 4}
    if kind in WRAPPERS:
        config = {"model_type": kind, "text_config": {"num_hidden_layers": 4}}
    live = live_model(config, auto=auto_of(kind))
    assert_same_parameters(planner.read_config(config), live)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_without_sub_configs_takes_the_defaults_of_both(kind):
    config = {"model_type": kind, "text_config": None}
    assert_same_parameters(planner.read_config(config), live_model(config, auto="image_text"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "name"), [("qwen3_5", "Qwen3_5ForCausalLM"), ("qwen3_5_moe", "Qwen3_5MoeForCausalLM")]
)
def test_the_language_model_alone_is_tied_as_its_own_config_says(kind, name, tied):
    text = {**OWN[kind]["text_config"], "tie_word_embeddings": tied}
    config = config_of(kind, text_config=text, tie_word_embeddings=not tied)
    live = live_model(config, auto="causal")
    assert type(live).__name__ == name
    model = planner.read_config({**config, "architectures": [name]})
    assert_same_parameters(model, live)
    assert (model.model_type, model.text_type) == (kind, f"{kind}_text")


def test_published_names_of_a_class_are_read():
    config = config_of("kimi_k25", architectures=["KimiK25ForConditionalGeneration"])
    live = live_model(config_of("kimi_k25"), auto="image_text")
    assert_same_parameters(planner.read_config(config), live)


def test_kimi_k2_is_a_deepseek_v3_under_its_own_name():
    kimi = planner.read_config(config_of("kimi_k2"))
    deepseek = planner.read_config(config_of("kimi_k2", model_type="deepseek_v3"))
    assert (kimi.model_type, kimi.text_type, SAME_AS) == (
        "kimi_k2",
        "deepseek_v3",
        {"kimi_k2": "deepseek_v3"},
    )
    assert kimi.layers == deepseek.layers
    work, h200 = planner.Inference(batch=1, prompt_tokens=8), planner.Deployment(gpu="h200")
    assert (
        planner.estimate(kimi, work, h200).memory == planner.estimate(deepseek, work, h200).memory
    )


@pytest.mark.parametrize("kind", WRAPPERS)
def test_towers_count_as_vision_and_projector(kind):
    config = config_of(kind)
    model, live = planner.read_config(config), live_model(config, auto="image_text")
    groups = model.parameter_groups()
    merger = sum(p.numel() for n, p in live.named_parameters() if "merger" in n or "mm_proj" in n)
    seen = sum(p.numel() for n, p in live.named_parameters() if "visual" in n or "vision" in n)
    assert groups["projector"][1] == merger
    assert groups["vision"][1] == seen - (merger if kind != "kimi_k25" else 0)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_theta": 7.0},
        {"rope_theta": None},
        {"rope_parameters": None},
        {"rope_parameters": {"rope_theta": None}, "rope_theta": 7.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": None},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_olmo_hybrid_has_rotary_positions_unless_its_theta_is_null(change):
    config = config_of("olmo_hybrid", **change)
    model, live = planner.read_config(config), live_model(config)
    assert hasattr(model.positions, "rope_theta") == (live.model.rotary_emb is not None)
    if live.model.rotary_emb is not None:
        assert model.positions.rope_theta == live.config.rope_parameters["rope_theta"]


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"partial_rotary_factor": None},
        {"partial_rotary_factor": 0.5},
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e7,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            }
        },
    ],
)
def test_qwens_turn_a_quarter_of_a_head_unless_told_otherwise(kind, change):
    config = config_of(kind, **change)
    model, live = planner.read_config(config), live_model(config)
    assert model.positions.rotary_dim == 2 * live.model.rotary_emb.inv_freq.numel()
    assert model.positions.rope_theta == live.config.rope_parameters["rope_theta"]


def test_the_dtype_of_a_wrapper_is_its_own_else_its_text_s():
    text = {**DELTA, "dtype": "float16"}
    inner = planner.read_config(config_of("qwen3_5", text_config=text))
    outer = planner.read_config(config_of("qwen3_5", text_config=text, torch_dtype="bfloat16"))
    assert (inner.dtype, outer.dtype) == ("fp16", "bf16")


def random_text(draw: Any, kind: str) -> dict[str, Any]:
    flag, small, layers = st.booleans(), st.integers(1, 5), draw(st.integers(2, 5))
    kv_heads = draw(st.integers(1, 3))
    heads, keys = kv_heads * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    # transformers asks the first attention layer for the cache's length
    drawn = draw(
        st.lists(
            st.sampled_from([LINEAR, FULL, "mamba", "attention"]),
            min_size=layers - 2,
            max_size=layers - 2,
        )
    )
    text: dict[str, Any] = {
        "vocab_size": draw(st.integers(4, 60)),
        "hidden_size": heads * draw(st.integers(2, 9)),
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 8 * draw(st.integers(1, 3)),
        "attention_bias": draw(flag),
        "layer_types": draw(st.permutations([LINEAR, FULL, *drawn])),
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * draw(st.integers(1, 3)),
        "linear_key_head_dim": draw(small),
        "linear_value_head_dim": draw(small),
        "linear_conv_kernel_dim": draw(small),
        "moe_intermediate_size": draw(st.integers(1, 20)),
        "shared_expert_intermediate_size": draw(st.integers(1, 20)),
        "num_experts": draw(st.integers(2, 5)),
        "num_experts_per_tok": draw(st.integers(1, 2)),
        "decoder_sparse_step": draw(st.integers(1, 3)),
        "mlp_only_layers": draw(st.lists(st.integers(0, 4), max_size=2)),
        "tie_word_embeddings": draw(flag),
    }
    if kind.startswith("kimi"):
        groups = draw(st.integers(1, 3))
        text |= {
            "num_key_value_heads": heads,
            "kv_lora_rank": draw(small),
            "q_lora_rank": draw(st.none() | small),
            "qk_rope_head_dim": 2 * draw(small),
            "qk_nope_head_dim": draw(small),
            "v_head_dim": draw(small),
            "n_shared_experts": draw(st.integers(1, 2)),
            "first_k_dense_replace": draw(st.integers(0, 6)),
            "n_group": groups,
            "topk_group": draw(st.integers(1, groups)),
            "linear_num_heads": draw(small),
            "linear_head_dim": draw(small),
        }
        experts = "num_experts" if kind == "kimi_linear" else "n_routed_experts"
        text[experts] = groups * draw(st.integers(2, 3))
        if kind != "kimi_linear":
            del text["layer_types"], text["head_dim"]
    return text


def random_config(draw: Any, kind: str) -> dict[str, Any]:
    text = {"pad_token_id": 0, **random_text(draw, kind)}
    if kind not in WRAPPERS:
        return {"model_type": kind, **text}
    heads, kimi = draw(st.integers(1, 3)), kind == "kimi_k25"
    width = 4 * heads * draw(st.integers(1, 3))
    vision = {
        "hidden_size": width,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(0, 3)),
        "patch_size": draw(st.integers(1, 5)),
    }
    if kimi:
        sides = st.integers(1, 4)
        vision |= {"pos_emb_height": draw(sides), "pos_emb_width": draw(sides)}
        vision["merge_kernel_size"] = [draw(sides), draw(sides)]
    else:
        for name in ("in_channels", "temporal_patch_size", "spatial_merge_size", "out_hidden_size"):
            vision[name] = draw(st.integers(1, 4))
        vision["num_position_embeddings"] = draw(st.integers(1, 20))
    return {
        "model_type": kind,
        "text_config": text,
        "vision_config": vision,
        "projection_hidden_size": width,
        "tie_word_embeddings": draw(st.booleans()),
    }


@given(data=st.data())
@examples(30)
def test_random_configs_are_those_of_their_class(data):
    kind = data.draw(st.sampled_from(list(OWN)))
    config = random_config(data.draw, kind)
    tokens = data.draw(st.integers(1, 9))
    assert_exact(config, auto=auto_of(kind), tokens=(2, tokens), static=data.draw(st.booleans()))


def test_gated_attention_is_refused_and_not_planned():
    model = planner.read_config(config_of("qwen3_next", layer_types=[FULL, FULL]))
    work, h200 = planner.Inference(batch=1, prompt_tokens=8), planner.Deployment(gpu="h200")
    with pytest.raises(ConfigError, match="does not plan gated attention of model_type=qwen3_next"):
        planner.estimate(model, work, h200)


TEXT, VISION = "text_config", "vision_config"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qwen3_next", {"layer_types": [LINEAR]}, "layer_types=.* a list of 2 words"),
        ("qwen3_next", {"layer_types": [LINEAR, "sliding_attention"]}, "layer_types has 'sliding"),
        ("qwen3_next", {"layer_types": [LINEAR, [FULL]]}, "layer_types has "),
        ("qwen3_next", {"linear_num_key_heads": 3}, "not a multiple of linear_num_key_heads=3"),
        ("qwen3_next", {"head_dim": None}, "head_dim is missing"),
        ("qwen3_next", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        (
            "qwen3_next",
            {"layer_types": None, "full_attention_interval": 0},
            "full_attention_interval=0 is not allowed",
        ),
        (
            "qwen3_next",
            {"layer_types": None, "full_attention_interval": None},
            "full_attention_interval is missing",
        ),
        ("qwen3_5_text", {"architectures": ["Qwen3_5ForTokenClassification"]}, r"architectures\[0"),
        ("qwen3_5_moe_text", {"num_experts": 0}, "num_experts=0 is not allowed"),
        ("qwen3_5_moe_text", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than"),
        ("olmo_hybrid", {"layer_types": [FULL, FULL]}, "layer_types has full_attention alone"),
        ("olmo_hybrid", {"head_dim": None}, "head_dim is missing"),
        ("olmo_hybrid", {"linear_key_head_dim": 0}, "linear_key_head_dim=0 is not allowed"),
        ("kimi_linear", {"linear_attn_config": None}, "linear_attn_config=None is not allowed"),
        ("kimi_linear", {"linear_attn_config": {"head_dim": None}}, "linear_head_dim=None"),
        (
            "kimi_linear",
            {
                "layer_types": None,
                "linear_attn_config": {"kda_layers": [1], "full_attn_layers": [3]},
            },
            "linear_attn_config.full_attn_layers=3 is not allowed",
        ),
        (
            "kimi_linear",
            {
                "layer_types": None,
                "linear_attn_config": {"kda_layers": [1], "full_attn_layers": []},
            },
            "linear_attn_config leaves layer 2 out",
        ),
        ("kimi_linear", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types=.* a list of 2"),
        ("kimi_linear", {"num_key_value_heads": 2}, "num_key_value_heads=2 is not allowed"),
        ("kimi_linear", {"num_expert_group": 8}, "n_group=8 is not allowed: groups of two"),
        ("kimi_linear", {"num_expert_group": 3}, "num_experts=8 is not a multiple of n_group=3"),
        ("kimi_k2", {"n_routed_experts": 2}, "n_group=2 is not allowed: groups of two"),
        ("qwen3_5", {TEXT: 7}, "text_config=7 is not allowed: an object or null"),
        ("qwen3_5", {VISION: []}, r"vision_config=\[\] is not allowed: an object or null"),
        ("qwen3_5", {TEXT: {**DELTA, "hidden_size": "x"}}, "hidden_size='x' is not allowed"),
        ("qwen3_5", {"architectures": ["Other"]}, r"architectures\[0\]='Other' is not read yet"),
        ("qwen3_5", {VISION: {**QWEN_VISION, "num_heads": 3}}, "multiple of num_heads=3"),
        ("qwen3_5", {VISION: {**QWEN_VISION, "patch_size": [4, 4]}}, r"patch_size=\[4, 4\]"),
        (
            "qwen3_5",
            {VISION: {**QWEN_VISION, "rope_parameters": {"rope_type": "linear"}}},
            "rope_type='linear' is not allowed: axial",
        ),
        ("kimi_k25", {TEXT: {"model_type": "llama"}}, "text_config.model_type='llama'"),
        ("kimi_k25", {"projection_hidden_size": None}, "projection_hidden_size is missing"),
        ("kimi_k25", {"projection_hidden_size": 8}, "projection_hidden_size=8 is not allowed"),
        ("kimi_k25", {VISION: {**KIMI_VISION, "merge_kernel_size": 2}}, "merge_kernel_size=2 is"),
    ],
)
def test_impossible_values_are_named(kind, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        planner.read_config(config_of(kind, **change))
    assert "\n" not in str(caught.value)
