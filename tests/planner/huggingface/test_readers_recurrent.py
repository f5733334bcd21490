"""Oracle: the live classes of linear attention, short convolutions and gated recurrences."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from tests.planner.oracle import assert_exact, assert_same_parameters, live_model
from tests.properties import examples

SMALL: dict[str, Any] = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
LINEAR, FULL, CONV, SLIDING = "linear_attention", "full_attention", "conv", "sliding_attention"
DELTA: dict[str, Any] = {
    "head_dim": 8,
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
OWN: dict[str, dict[str, Any]] = {
    "qwen3_next": {**DELTA, **EXPERTS},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **EXPERTS},
    "olmo_hybrid": {k: v for k, v in DELTA.items() if k != "head_dim"},
    "kimi_linear": {
        "num_key_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 12,
        "layer_types": [LINEAR, FULL],
        "linear_num_heads": 3,
        "linear_head_dim": 6,
        "kv_lora_rank": 10,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 8,
    },
    "minimax": {"num_local_experts": 4},
    "lfm2": {"layer_types": [CONV, FULL], "block_multiple_of": 8},
    "lfm2_moe": {
        "layer_types": [CONV, FULL],
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    "lfm3": {
        "head_dim": 8,
        "num_hidden_layers": 3,
        "layer_types": [CONV, FULL, SLIDING],
        "sliding_window": 4,
    },
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "attention_window_size": 4,
        "lru_width": 24,
        "num_key_value_heads": 1,
    },
    "nemotron_h": {
        "head_dim": 8,
        "hybrid_override_pattern": "*ME-",
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 2,
        "n_routed_experts": 4,
        "moe_intermediate_size": 12,
        "moe_shared_expert_intermediate_size": 20,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "mamba_d_state": 4,
        "mamba_ngroups": 2,
        "n_mamba_heads": 8,
        "num_key_value_heads": 4,
        "num_mem_blocks": 2,
        "adapter_rank": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid", "hybrid"],
    },
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in OWN),
    ("qwen3_next", {"attention_bias": True, "mlp_only_layers": [0], "tie_word_embeddings": True}),
    ("qwen3_next", {"layer_types": None, "num_hidden_layers": 5, "decoder_sparse_step": 2}),
    ("qwen3_next", {"layer_types": None, "full_attention_interval": 2}),
    ("qwen3_5_text", {"attention_bias": True, "tie_word_embeddings": True}),
    ("qwen3_5_text", {"linear_conv_kernel_dim": 2, "partial_rotary_factor": 0.5}),
    ("qwen3_5_moe_text", {"num_experts_per_tok": 3, "linear_num_value_heads": 2}),
    ("olmo_hybrid", {"num_key_value_heads": None, "attention_bias": True}),
    ("olmo_hybrid", {"layer_types": None, "linear_key_head_dim": None}),
    ("olmo_hybrid", {"linear_num_key_heads": None, "linear_num_value_heads": None}),
    ("kimi_linear", {"layer_types": None, "num_hidden_layers": 5, "first_k_dense_replace": 2}),
    (
        "kimi_linear",
        {
            "layer_types": None,
            "linear_attn_config": {
                "full_attn_layers": [1],
                "kda_layers": [2],
                "num_heads": 5,
                "head_dim": 4,
                "short_conv_kernel_size": 3,
            },
        },
    ),
    ("kimi_linear", {"mlp_layer_types": ["sparse", "dense"], "num_shared_experts": 2}),
    ("minimax", {"layer_types": None, "num_hidden_layers": 5, "head_dim": 12}),
    ("minimax", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    ("lfm2", {"conv_bias": True, "tie_embedding": False, "block_ff_dim": 50}),
    ("lfm2", {"layer_types": None, "full_attn_idxs": [1], "block_ffn_dim_multiplier": 1.3}),
    ("lfm2", {"layer_types": None, "block_auto_adjust_ff_dim": False, "conv_L_cache": 5}),
    ("lfm2_moe", {"num_dense_layers": 0, "use_expert_bias": False, "conv_bias": True}),
    ("lfm3", {"use_sandwich_norm": False, "use_attention_gate": False, "attention_bias": True}),
    ("lfm3", {"layer_types": None, "num_hidden_layers": 6, "conv_bias": True}),
    ("recurrent_gemma", {"block_types": ["attention", "recurrent"], "attention_bias": True}),
    ("recurrent_gemma", {"lru_width": None, "num_key_value_heads": None, "conv1d_width": 3}),
    ("nemotron_h", {"moe_latent_size": 6, "mlp_bias": True, "num_experts_per_tok": 3}),
    ("nemotron_h", {"use_bias": True, "mamba_n_groups": 4, "mamba_d_conv": 3}),
    (
        "nemotron_h",
        {"hybrid_override_pattern": "M", "layers_block_type": ["attention", "mamba", "mlp"]},
    ),
    ("zamba2", {"use_shared_attention_adapter": True, "add_bias_linear": True}),
    ("zamba2", {"use_mem_rope": True, "num_key_value_heads": None, "use_conv_bias": False}),
    ("zamba2", {"num_mem_blocks": 1, "use_long_context": True, "intermediate_size": None}),
]


def config_of(kind: str, **change: Any) -> dict[str, Any]:
    return {"model_type": kind, **SMALL, **OWN[kind], **change}


@pytest.mark.parametrize(
    ("kind", "change"), VARIANTS, ids=[f"{i} {kind}" for i, (kind, _) in enumerate(VARIANTS)]
)
def test_parameters_and_states_are_those_of_the_class(kind, change):
    # minimax has a cache of its own, and no other
    assert_exact(config_of(kind, **change), tokens=(2, 5), static=kind != "minimax")


@pytest.mark.parametrize("kind", [kind for kind in OWN if kind != "lfm2_moe"])
def test_absent_fields_take_the_defaults_of_their_class(kind):
    layers = {} if kind in ("nemotron_h", "zamba2") else {"num_hidden_layers": 4}
    config = {"model_type": kind, **layers}
    assert_same_parameters(planner.read_config(config), live_model(config))


@given(data=st.data())
@examples(30)
def test_random_configs_are_those_of_their_class(data):
    draw, flag, small = data.draw, st.booleans(), st.integers(1, 5)
    kind = draw(st.sampled_from(list(OWN)))
    kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    heads = kv_heads * draw(st.integers(1, 3))
    change: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kind == "kimi_linear" else kv_heads,
        "hidden_size": 4 * heads * draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(4, 60)),
        "intermediate_size": draw(st.integers(8, 40)),
        "tie_word_embeddings": draw(flag),
    }
    kinds = [LINEAR, FULL]
    if kind.startswith("lfm"):
        kinds = [CONV, FULL, *[SLIDING] * (kind == "lfm3")]
        change |= {"conv_L_cache": draw(st.integers(1, 5)), "conv_bias": draw(flag)}
        change |= {"sliding_window": draw(st.integers(2, 6))}
    if "layer_types" in OWN[kind]:
        more = draw(st.lists(st.sampled_from(kinds), min_size=layers - 2, max_size=layers - 2))
        change |= {"layer_types": [FULL, kinds[0], *more], "num_hidden_layers": layers}
    if "linear_key_head_dim" in OWN[kind]:
        keys = draw(st.integers(1, 3))
        change |= {"linear_num_key_heads": keys, "linear_key_head_dim": draw(small)}
        change |= {"linear_num_value_heads": keys * 2, "linear_value_head_dim": draw(small)}
        change |= {"linear_conv_kernel_dim": draw(small), "attention_bias": draw(flag)}
    if "head_dim" in OWN[kind]:
        change["head_dim"] = 8 * draw(st.integers(1, 2))
    if kind == "recurrent_gemma":
        words = st.sampled_from(["recurrent", "attention"])
        change["block_types"] = ["attention", *draw(st.lists(words, max_size=3))]
        change |= {"lru_width": heads * draw(small), "conv1d_width": draw(st.integers(2, 5))}
        change["num_hidden_layers"] = layers
    if kind == "nemotron_h":
        pattern = draw(st.lists(st.sampled_from("ME-*"), max_size=4))
        change["hybrid_override_pattern"] = "*" + "".join(pattern)
        change |= {"moe_latent_size": draw(st.sampled_from([None, 6])), "mlp_bias": draw(flag)}
    if kind == "zamba2":
        words = st.sampled_from(["mamba", "hybrid"])
        change["layers_block_type"] = ["mamba", "hybrid", *draw(st.lists(words, max_size=4))]
        change["num_hidden_layers"] = len(change["layers_block_type"])
        change |= {"num_mem_blocks": draw(st.integers(1, 3)), "n_mamba_heads": heads}
        change |= {"use_shared_attention_adapter": draw(flag), "adapter_rank": draw(small)}
        change |= {"mamba_ngroups": 1, "num_key_value_heads": heads}
    assert_exact(config_of(kind, **change), tokens=(draw(st.integers(2, 8)),), static=False)


@given(
    tie=st.booleans(),
    layers=st.integers(1, 4),
    hidden=st.integers(1, 40),
    inner=st.sampled_from([None, 12, 50]),
    tokens=st.integers(1, 6),
)
@examples(10)
def test_the_state_of_rwkv_is_what_its_class_returns(tie, layers, hidden, inner, tokens):
    config = {
        "model_type": "rwkv",
        "vocab_size": 30,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "tie_word_embeddings": tie,
    }
    # of one layer its class cannot draw weights
    assert_exact(config, device="meta", tokens=(tokens,), static=False)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qwen3_next", {"layer_types": [CONV, FULL]}, "layer_types has 'conv': one of"),
        ("qwen3_next", {"linear_num_key_heads": 3}, "linear_num_value_heads=4 is not a multiple"),
        ("qwen3_5_moe_text", {"num_experts": 0}, "num_experts=0 is not allowed"),
        ("olmo_hybrid", {"layer_types": [FULL, FULL]}, "full_attention alone"),
        ("kimi_linear", {"linear_attn_config": 3}, "linear_attn_config=3 is not allowed"),
        ("kimi_linear", {"mlp_layer_types": ["dense"]}, "mlp_layer_types=.* a list of 2"),
        ("minimax", {"sliding_window": 4}, "sliding_window is not allowed"),
        ("lfm2", {"layer_types": None, "full_attn_idxs": 3}, "full_attn_idxs=3 is not allowed"),
        ("lfm2_moe", {"layer_types": None}, "layer_types is missing"),
        ("lfm3", {"sliding_window": None}, "sliding_window=None is not allowed"),
        ("recurrent_gemma", {"block_types": ["x"]}, "block_types=.* is not allowed"),
        ("recurrent_gemma", {"lru_width": 23}, "lru_width=23 is not a multiple"),
        ("nemotron_h", {"hybrid_override_pattern": "MX"}, "hybrid_override_pattern='MX'"),
        ("nemotron_h", {"layers_block_type": ["conv"]}, "layers_block_type has 'conv'"),
        ("zamba2", {"num_hidden_layers": 2}, "layers_block_type=.* 2 words"),
        (
            "zamba2",
            {"num_key_value_heads": 2, "use_shared_attention_adapter": True},
            "num_key_value_heads=2 is not allowed: 4",
        ),
        ("lfm2", {"block_ffn_dim_multiplier": None}, "block_ffn_dim_multiplier is missing"),
        ("minimax", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ("zamba2", {"n_mamba_heads": 7}, "n_mamba_heads=7 does not divide"),
    ],
)
def test_impossible_values_are_named(kind, change, message):
    with pytest.raises(ConfigError, match=message):
        planner.read_config(config_of(kind, **change))
