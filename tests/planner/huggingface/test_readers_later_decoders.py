"""Oracle: modules and caches of transformers' own classes on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError, kv_cache_bytes
from planner.huggingface import READERS
from planner.layers import GQA
from tests.planner.configs import BASE, build
from tests.planner.test_kv_cache import cache_bytes, prefill
from tests.planner.test_parameters import live_parameters, our_parameters
from tests.properties import examples

DENSE = (
    "cohere",
    "cohere2",
    "exaone4",
    "glm",
    "glm4",
    "hunyuan_v1_dense",
    "ministral",
    "nemotron",
)
MIXTURES = (
    "dbrx",
    "deepseek_v2",
    "glm4_moe",
    "gpt_oss",
    "hunyuan_v1_moe",
    "llama4_text",
    "minimax_m2",
    "phimoe",
)
TYPES = (*DENSE, *MIXTURES)
assert set(TYPES) <= set(READERS)
SMALL: dict[str, Any] = {
    **BASE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "vocab_size": 30,
    "num_hidden_layers": 4,
    "pad_token_id": 0,
}
MIXTURE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
OWN: dict[str, dict[str, Any]] = {
    "cohere2": {"sliding_window": 8},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 5e5, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 1,
    },
    "exaone4": {"sliding_window": 8},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 20,
        "n_group": 2,
    },
    "gpt_oss": {**MIXTURE, "head_dim": 8, "sliding_window": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "llama4_text": {
        "head_dim": 8,
        "num_local_experts": 4,
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 40,
    },
    "minimax_m2": {**MIXTURE, "head_dim": 8},
    "ministral": {"head_dim": 8, "sliding_window": 8},
    "phimoe": MIXTURE,
}
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in TYPES),
    ("cohere", {"use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False}),
    ("cohere", {"head_dim": 12, "num_key_value_heads": None}),
    ("cohere2", {"sliding_window_pattern": 2, "attention_bias": True, "head_dim": 12}),
    ("cohere2", {"layer_types": [FULL, SLIDING, FULL, SLIDING]}),
    (
        "dbrx",
        {
            "rope_theta": 77.0,
            "ffn_config": {
                "ffn_hidden_size": 8,
                "ffn_act_fn": {"name": "gelu"},
                "moe_normalize_expert_weights": None,
            },
        },
    ),
    ("deepseek_v2", {"q_lora_rank": None, "attention_bias": True, "mlp_bias": True}),
    (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    ),
    ("deepseek_v2", {"num_key_value_heads": None, "first_k_dense_replace": 9}),
    ("exaone4", {"sliding_window": None, "layer_types": [FULL] * 4, "head_dim": 12}),
    ("exaone4", {"sliding_window_pattern": 2}),
    ("exaone4", {"sliding_window_pattern": "LG", "layer_types": [SLIDING, FULL] * 2}),
    ("glm", {"attention_bias": False, "tie_word_embeddings": True}),
    ("glm", {"partial_rotary_factor": 1.0, "sliding_window": 8}),
    ("glm4", {"attention_bias": False, "head_dim": 16}),
    ("glm4", {"partial_rotary_factor": None}),
    ("glm4_moe", {"use_qk_norm": True, "attention_bias": True, "head_dim": 12}),
    ("glm4_moe", {"first_k_dense_replace": 0, "n_shared_experts": 2}),
    ("gpt_oss", {"attention_bias": False, "layer_types": [FULL, FULL, SLIDING, FULL]}),
    ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
    ("hunyuan_v1_dense", {"attention_bias": True, "num_key_value_heads": None}),
    ("hunyuan_v1_moe", {"attention_bias": True, "moe_topk": [1, 2, 3, 1]}),
    ("llama4_text", {"interleave_moe_layer_step": 2, "use_qk_norm": False}),
    ("llama4_text", {"no_rope_layers": [0, 1, 1, 0], "moe_layers": [], "attention_bias": True}),
    ("llama4_text", {"layer_types": [FULL, CHUNKED, FULL, FULL], "moe_layers": [1]}),
    ("minimax_m2", {"rotary_dim": 4, "tie_word_embeddings": True}),
    ("ministral", {"layer_types": [SLIDING, FULL, FULL, SLIDING]}),
    ("nemotron", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    ("nemotron", {"partial_rotary_factor": 0.25, "head_dim": 16}),
    ("phimoe", {"lm_head_bias": True, "attention_bias": True, "sliding_window": 8}),
    ("phimoe", {"tie_word_embeddings": True, "lm_head_bias": True, "head_dim": 12}),
]
by_variant = pytest.mark.parametrize(
    ("kind", "change"), VARIANTS, ids=[f"{i} {kind}" for i, (kind, _) in enumerate(VARIANTS)]
)


def tiny(kind: str, **change: Any) -> dict[str, Any]:
    base = {"vocab_size": 30} if kind == "dbrx" else SMALL
    return {**base, "model_type": kind, **OWN.get(kind, {}), **change}


def variant(kind: str, change: dict[str, Any]) -> dict[str, Any]:
    config = tiny(kind, **change)
    if kind == "dbrx":
        config["attn_config"] = OWN["dbrx"]["attn_config"]
    return config


@by_variant
def test_parameters_positions_scales_and_cache_are_those_of_the_class(kind, change):
    config = variant(kind, change)
    model, live = planner.read_config(config), build(config)
    assert our_parameters(model) == {n: tuple(p.shape) for n, p in live.named_parameters()}
    assert model.parameter_count == sum(p.numel() for p in live.parameters())
    rotary = getattr(live, "transformer" if kind == "dbrx" else "model").rotary_emb
    assert model.positions.rotary_dim == 2 * rotary.inv_freq.numel()
    assert model.positions.rope_type == live.config.rope_parameters["rope_type"]
    assert model.positions.rope_theta == live.config.rope_parameters["rope_theta"]
    scalings = {m.scaling for m in live.modules() if type(m).__name__.endswith("Attention")}
    assert {layer.attention.scaling for layer in model.layers} == scalings
    assert model.logit_scale == getattr(live, "logit_scale", None)
    for batch, tokens in ((3, 7), (2, 9)):  # a window of 8 keeps 7
        expected = cache_bytes(prefill(live, batch, tokens))
        got = kv_cache_bytes(model, batch=batch, context_tokens=tokens, dtype="bf16")
        assert got == expected, (batch, tokens)


@pytest.mark.parametrize("kind", TYPES)
def test_absent_fields_take_the_defaults_of_their_class(kind):
    config: dict[str, Any] = {"model_type": kind, "num_hidden_layers": 4}
    required = {
        "dbrx": {"attn_config": {"rope_theta": 1.0}},
        "deepseek_v2": {"num_experts_per_tok": 6},
        "glm4_moe": {"head_dim": 128},
        "hunyuan_v1_dense": {"head_dim": 128},
        "hunyuan_v1_moe": {"head_dim": 128},
        "ministral": {"head_dim": 128},
        "nemotron": {"num_key_value_heads": 48},
    }
    config |= required.get(kind, {})
    if kind == "dbrx":
        config["n_layers"] = config.pop("num_hidden_layers")
    assert our_parameters(planner.read_config(config)) == live_parameters(config)


@given(data=st.data())
@examples(32)
def test_random_configs_have_the_parameters_and_caches_of_their_class(data):
    draw = data.draw
    kind = draw(st.sampled_from(TYPES))
    kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    heads, flag = kv_heads * draw(st.sampled_from([1, 2, 4])), st.booleans()
    config = tiny(
        kind,
        num_attention_heads=heads,
        num_key_value_heads=heads if kind == "deepseek_v2" else kv_heads,
        num_hidden_layers=layers,
        hidden_size=4 * heads * draw(st.integers(1, 3)),
        intermediate_size=draw(st.integers(1, 50)),
        vocab_size=draw(st.integers(4, 90)),
        tie_word_embeddings=draw(flag),
        attention_bias=draw(flag),
        mlp_bias=draw(flag),
        use_qk_norm=draw(flag),
        lm_head_bias=draw(flag),
        rms_norm_eps=1e-4,
    )
    if kind == "dbrx":
        ffn = {"ffn_hidden_size": draw(st.integers(1, 40)), "moe_num_experts": 3}
        config = tiny(
            kind,
            d_model=4 * heads,
            n_heads=heads,
            n_layers=layers,
            attn_config={"kv_n_heads": kv_heads, "rope_theta": 1.0, "clip_qkv": 2.0},
            ffn_config=ffn,
        )
    elif kind != "deepseek_v2" and ("head_dim" in OWN.get(kind, {}) or draw(flag)):
        config["head_dim"] = 4 * draw(st.integers(1, 6))
    if kind in ("cohere2", "exaone4"):
        config["sliding_window_pattern"] = draw(st.integers(1, 4))
    if kind in ("deepseek_v2", "glm4_moe"):
        config["first_k_dense_replace"] = draw(st.integers(0, 6))
        config["n_shared_experts"] = draw(st.integers(1, 3))
    if kind == "llama4_text":
        config["interleave_moe_layer_step"] = draw(st.integers(1, 5))
        config["no_rope_layer_interval"] = draw(st.integers(1, 5))
    for name in ("sliding_window", "attention_chunk_size"):
        if name in config:
            config[name] = draw(st.integers(2, 20))
    model, live = planner.read_config(config), build(config)
    assert our_parameters(model) == {n: tuple(p.shape) for n, p in live.named_parameters()}
    tokens = draw(st.integers(1, 24))
    expected = cache_bytes(prefill(live, 2, tokens))
    assert kv_cache_bytes(model, batch=2, context_tokens=tokens, dtype="bf16") == expected


@pytest.mark.parametrize("kind", MIXTURES)
def test_active_parameters_are_those_of_the_picked_experts(kind):
    config = tiny(kind)
    idle = sum(
        p.numel() - p.numel() * (1 if kind == "llama4_text" else 2) // 4
        for name, p in build(config).named_parameters()
        if ".experts." in name
    )
    model = planner.read_config(config)
    assert idle > 0
    assert model.active_parameter_count == model.parameter_count - idle


def test_layers_without_positions_are_those_of_the_class():
    cohere2 = planner.read_config(tiny("cohere2"))
    assert [_gqa(layer).rope for layer in cohere2.layers] == [True, True, True, False]
    exaone = tiny("exaone4", sliding_window=None, layer_types=[FULL] * 4)
    assert all(_gqa(layer).rope for layer in planner.read_config(exaone).layers)
    config = tiny("llama4_text", no_rope_layers=[0, 1, 1, 0])
    llama4, live = planner.read_config(config), build(config)
    for layer, module in zip(llama4.layers, live.model.layers, strict=True):
        attention = module.self_attn
        assert _gqa(layer).rope == bool(attention.use_rope)
        assert (_gqa(layer).qk_norm is not None) == hasattr(attention, "qk_norm")


def _gqa(layer) -> GQA:
    assert isinstance(layer.attention, GQA)
    return layer.attention


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("cohere", {"logit_scale": None}, "logit_scale is missing"),
        ("cohere", {"head_dim": None}, "head_dim is missing"),
        ("cohere2", {"sliding_window": None}, "sliding_window is missing"),
        ("cohere2", {"sliding_window_pattern": 0}, "sliding_window_pattern=0 is not allowed"),
        ("cohere2", {"layer_types": [FULL]}, "layer_types=.* a list of 4 words"),
        ("cohere2", {"layer_types": [CHUNKED] * 4}, "layer_types has 'chunked_attention'"),
        ("dbrx", {"tie_word_embeddings": True}, "tie_word_embeddings=True is not allowed"),
        ("dbrx", {"attn_config": {}}, r"attn_config\.rope_theta is missing"),
        ("dbrx", {"attn_config": 3}, "attn_config=3 is not allowed"),
        ("dbrx", {"ffn_config": {"moe_top_k": 9}}, "num_experts_per_tok=9 is more than"),
        ("dbrx", {"ffn_config": {"moe_normalize_expert_weights": 2.0}}, "weights=2.0 is not"),
        ("dbrx", {"ffn_config": {"ffn_act_fn": {"name": "no"}}}, r"ffn_act_fn\.name='no'"),
        ("dbrx", {"ffn_config": {"ffn_act_fn": "silu"}}, "ffn_act_fn='silu' is not allowed"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' is not allowed"),
        ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads=2 is not allowed"),
        ("deepseek_v2", {"hidden_size": 30}, "hidden_size=30 is not a multiple"),
        ("exaone4", {"sliding_window": None}, "sliding_window=None is not allowed without"),
        ("exaone4", {"sliding_window_pattern": "LLLG"}, "sliding_window_pattern='LLLG'"),
        ("exaone4", {"sliding_window": None, "layer_types": [SLIDING] * 4}, "sliding layers"),
        ("glm", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ("glm4", {"partial_rotary_factor": 3.0}, "partial_rotary_factor=3.0 is not allowed"),
        ("glm4_moe", {"n_group": 3}, "not a multiple of n_group=3"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window is missing"),
        ("hunyuan_v1_dense", {"head_dim": None}, "head_dim is missing"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2]}, r"moe_topk=\[1, 2\] is not allowed"),
        ("hunyuan_v1_moe", {"moe_topk": [1, 2, 3, 9]}, "num_experts_per_tok=9 is more than"),
        ("llama4_text", {"attention_chunk_size": None}, "attention_chunk_size is missing"),
        ("llama4_text", {"no_rope_layers": [1, 0]}, "no_rope_layers=.* a list of 4"),
        ("llama4_text", {"moe_layers": ["a"]}, r"moe_layers=\['a'\] is not allowed"),
        ("minimax_m2", {"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ("ministral", {"head_dim": None}, "head_dim is missing"),
        ("nemotron", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ("nemotron", {"hidden_act": "no"}, "hidden_act='no' is not allowed"),
        ("phimoe", {"num_experts_per_tok": 1}, "num_experts_per_tok=1 is not allowed"),
        ("phimoe", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "short_mscale=None"),
    ],
)
def test_a_value_that_is_not_read_is_refused_by_name(kind, change, message):
    with pytest.raises(ConfigError, match=message):
        planner.read_config(tiny(kind, **change))
