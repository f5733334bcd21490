"""Oracle: the live classes of state-space models and their hybrids on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from tests.planner.oracle import assert_exact, assert_same_parameters, live_model
from tests.properties import examples

SMALL = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2}
ATTENTION = {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_state": 4, "mamba_n_groups": 2}
OWN: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4},
    "falcon_mamba": {"state_size": 4},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2},
    "jamba": {
        **ATTENTION,
        "num_hidden_layers": 4,
        "num_experts": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
    },
    "bamba": {**ATTENTION, **MAMBA2, "attn_layer_indices": [1]},
    "falcon_h1": {**ATTENTION, **MAMBA2, "mamba_d_ssm": 64},
    "granitemoehybrid": {
        **ATTENTION,
        **MAMBA2,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
    },
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in OWN),
    ("mamba", {"tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False}),
    ("mamba", {"expand": 3, "time_step_rank": 7, "conv_kernel": 3, "intermediate_size": 9}),
    ("mamba", {"architectures": ["MambaModel"]}),
    ("falcon_mamba", {"use_bias": True, "time_step_rank": 3}),
    ("mamba2", {"use_bias": True, "tie_word_embeddings": True, "n_groups": 1, "conv_kernel": 2}),
    ("jamba", {"num_experts": 0}),
    ("jamba", {"num_experts": 4, "num_local_experts": 3}),
    ("jamba", {"num_experts": 1, "tie_word_embeddings": True}),
    ("jamba", {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 5}),
    ("jamba", {"num_key_value_heads": 4, "num_hidden_layers": 5, "num_experts_per_tok": 1}),
    ("bamba", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("bamba", {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_d_head": 8}),
    ("bamba", {"rope_theta": 5.0, "mamba_expand": 3, "attn_layer_indices": [0, 1]}),
    ("falcon_h1", {"projectors_bias": True, "mamba_rms_norm": True}),
    ("falcon_h1", {"mamba_d_ssm": None, "mamba_proj_bias": True, "attention_bias": True}),
    ("falcon_h1", {"mlp_bias": True, "mamba_conv_bias": False, "head_dim": 12}),
    ("granitemoehybrid", {"num_local_experts": 0, "position_embedding_type": "rope"}),
    ("granitemoehybrid", {"layer_types": ["full_attention", "linear_attention"]}),
    ("granitemoehybrid", {"attention_bias": True, "mamba_proj_bias": True}),
]


def config_of(kind: str, **change: Any) -> dict[str, Any]:
    return {"model_type": kind, **SMALL, **OWN[kind], **change}


@pytest.mark.parametrize(
    ("kind", "change"), VARIANTS, ids=[f"{i} {kind}" for i, (kind, _) in enumerate(VARIANTS)]
)
def test_parameters_and_states_are_those_of_the_class(kind, change):
    assert_exact(config_of(kind, **change), tokens=(2, 5))


@pytest.mark.parametrize("kind", OWN)
def test_absent_fields_take_the_defaults_of_their_class(kind):
    config = {"model_type": kind, "num_hidden_layers": 2}
    assert_same_parameters(planner.read_config(config), live_model(config))


@given(data=st.data())
@examples(30)
def test_random_configs_are_those_of_their_class(data):
    draw, flag, small = data.draw, st.booleans(), st.integers(1, 5)
    kind = draw(st.sampled_from(list(OWN)))
    kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    heads, expand = kv_heads * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    hidden = 4 * heads * draw(st.integers(1, 3))
    change: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": draw(st.integers(4, 60)),
        "tie_word_embeddings": draw(flag),
    }
    if kind in ("mamba", "falcon_mamba", "mamba2"):
        change |= {"state_size": draw(small), "conv_kernel": draw(st.integers(1, 5))}
        change |= {"use_bias": draw(flag), "use_conv_bias": draw(flag), "expand": expand}
        if kind == "mamba2":
            groups = draw(st.sampled_from([1, heads]))
            change |= {"num_heads": heads, "head_dim": expand * hidden // heads, "n_groups": groups}
    else:
        change |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        change |= {"intermediate_size": draw(st.integers(1, 40)), "mamba_expand": expand}
        change |= {"mamba_d_state": draw(small), "mamba_d_conv": draw(st.integers(1, 5))}
        change |= {"mamba_proj_bias": draw(flag), "mamba_conv_bias": draw(flag)}
        change |= {"attention_bias": draw(flag), "mlp_bias": draw(flag)}
        change |= {"mamba_n_heads": heads, "mamba_d_head": "auto", "mamba_n_groups": 1}
    if kind == "bamba":
        change["attn_layer_indices"] = draw(st.lists(st.integers(0, layers - 1), min_size=1))
    if kind == "falcon_h1":
        change["mamba_d_ssm"] = draw(st.sampled_from([None, heads * 6]))
        change |= {"projectors_bias": draw(flag), "mamba_rms_norm": draw(flag)}
    if kind == "granitemoehybrid":
        kinds = st.sampled_from(["mamba", "attention", "full_attention", "linear_attention"])
        drawn = draw(st.lists(kinds, min_size=layers - 1, max_size=layers - 1))
        # transformers asks the first attention layer for the cache's length
        change["layer_types"] = ["attention", *drawn]
        change["num_local_experts"] = draw(st.sampled_from([0, 2, 3]))
    if kind == "jamba":
        period = draw(st.integers(1, layers))
        change |= {
            "attn_layer_period": period,
            "attn_layer_offset": draw(st.integers(0, period - 1)),
        }
        change |= {"num_experts": draw(st.integers(1, 4)), "num_experts_per_tok": 1}
    assert_exact(config_of(kind, **change), tokens=(draw(st.integers(1, 6)),), static=False)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("mamba", {"expand": "2"}, "expand='2' is not allowed"),
        ("mamba", {"expand": 1.5}, r"expand=1\.5 is not allowed"),
        ("jamba", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ("mamba", {"time_step_rank": None}, "time_step_rank is missing"),
        ("mamba2", {"num_heads": 3}, r"num_heads=3 · head_dim=8 is not expand"),
        ("bamba", {"attn_layer_indices": "all"}, "attn_layer_indices='all' is not allowed"),
        ("bamba", {"layer_types": ["mamba"] * 2}, "layer_types is not allowed"),
        ("bamba", {"mamba_n_heads": 7}, "mamba_n_heads=7 does not divide"),
        ("bamba", {"mamba_d_head": 9}, "mamba_n_heads=8 · mamba_d_head=9 is not 64"),
        ("granitemoehybrid", {"layer_types": ["mamba"]}, "layer_types=.* a list of 2 words"),
        ("granitemoehybrid", {"layer_types": ["mamba", 3]}, "layer_types has 3: one of"),
        ("jamba", {"attn_layer_offset": 4}, "attn_layer_offset=4 is not allowed"),
        ("mamba", {"architectures": ["Other"]}, r"architectures\[0\]='Other'"),
    ],
)
def test_impossible_values_are_named(kind, change, message):
    with pytest.raises(ConfigError, match=message):
        planner.read_config(config_of(kind, **change))


def test_activations_of_recurrent_layers_are_refused_and_not_guessed():
    work = planner.Inference(batch=1, prompt_tokens=8)
    for runtime in ("transformers", "vllm", "attnlab"):
        deploy = planner.Deployment(gpu="h200", runtime=runtime)
        with pytest.raises(ConfigError, match="Mamba layers"):
            planner.estimate(planner.read_config(config_of("mamba")), work, deploy)
