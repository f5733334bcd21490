"""Oracle: modules and caches of transformers' own classes on the meta device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import CacheSpec, ConfigError, kv_cache_bytes
from tests.planner.configs import BASE
from tests.planner.oracle import (
    assert_same_parameters,
    live_cache_bytes,
    live_model,
    live_prefill,
)
from tests.properties import examples

SMALL: dict[str, Any] = {
    **BASE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "vocab_size": 30,
    "num_hidden_layers": 4,
}
LATENT: dict[str, Any] = {
    **SMALL,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "n_group": 2,
    "topk_group": 1,
}
INDEXED: dict[str, Any] = {
    **LATENT,
    "index_n_heads": 3,
    "index_head_dim": 10,
    "index_topk": 5,
}
TINY: dict[str, dict[str, Any]] = {
    "deepseek_v4": {
        **SMALL,
        "intermediate_size": 20,
        "head_dim": 16,
        "qk_rope_head_dim": 4,
        "q_lora_rank": 12,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "o_groups": 2,
        "o_lora_rank": 6,
        "index_n_heads": 3,
        "index_head_dim": 8,
        "index_topk": 2,
        "sliding_window": 8,
        "compress_ratios": [0, 4, 128, 4],
        "hc_mult": 3,
    },
    "deepseek_v32": INDEXED,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": INDEXED,
    "ministral3": {**SMALL, "head_dim": 8},
    "mistral4": {**LATENT, "architectures": ["Mistral4ForCausalLM"]},
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
QUERIES = {**YARN, "rope_theta": 5e5, "llama_4_scaling_beta": 0}
DENSE, SPARSE = "dense", "sparse"
FULL, SLIDING = "full_attention", "sliding_attention"
HEAVY, CHOSEN = "heavily_compressed_attention", "compressed_sparse_attention"
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in TINY),
    *((kind, {"tie_word_embeddings": True}) for kind in TINY),
    ("deepseek_v32", {"attention_bias": True, "mlp_bias": True, "n_shared_experts": 2}),
    ("deepseek_v32", {"first_k_dense_replace": 0, "num_experts": 6}),
    ("deepseek_v32", {"num_experts": None, "index_head_dim": 4}),
    ("deepseek_v32", {"mlp_layer_types": [SPARSE, DENSE, DENSE, SPARSE]}),
    ("deepseek_v32", {"layer_types": ["deepseek_sparse_attention"] * 4, "head_dim": 3}),
    ("deepseek_v32", {"rope_scaling": YARN, "rope_theta": 7.0, "sliding_window": 4}),
    ("deepseek_v32", {"architectures": ["DeepseekV32Model"]}),
    ("deepseek_v4", {"compress_ratios": None, "num_hidden_layers": 6}),
    ("deepseek_v4", {"layer_types": [SLIDING] * 5, "sliding_window": 1}),
    ("deepseek_v4", {"layer_types": [HEAVY, CHOSEN] * 2, "compress_rate_hca": 7}),
    ("deepseek_v4", {"compress_rates": {HEAVY: 2, CHOSEN: 3}, "compress_rate_csa": None}),
    ("deepseek_v4", {"compress_rate_csa": 9, "compress_rate_hca": 9, "sliding_window": 2}),
    ("deepseek_v4", {"mlp_bias": True, "attention_bias": True, "n_shared_experts": 2}),
    ("deepseek_v4", {"num_local_experts": 6, "num_hash_layers": 1, "scoring_func": "sigmoid"}),
    ("deepseek_v4", {"mlp_layer_types": ["hash_moe", "moe"] * 2, "hc_mult": 1}),
    ("deepseek_v4", {"architectures": ["DeepseekV4Model"], "qk_rope_head_dim": 8}),
    ("glm4_moe_lite", {"q_lora_rank": None, "attention_bias": True}),
    ("glm4_moe_lite", {"mlp_layer_types": [SPARSE, DENSE, DENSE, SPARSE, SPARSE]}),
    ("glm4_moe_lite", {"first_k_dense_replace": 3, "head_dim": 6, "num_local_experts": 6}),
    ("glm4_moe_lite", {"partial_rotary_factor": 1.0, "rope_interleave": False}),
    ("glm4_moe_lite", {"num_key_value_heads": 3, "rope_parameters": {**YARN, "rope_theta": 9.0}}),
    ("glm_moe_dsa", {"indexer_types": ["full", "shared", "shared", "full", "shared"]}),
    ("glm_moe_dsa", {"index_topk_pattern": "FSFSS", "num_local_experts": 8}),
    ("glm_moe_dsa", {"index_topk_pattern": ["full", "full", "full", "shared"]}),
    ("glm_moe_dsa", {"index_topk_freq": 2, "num_hidden_layers": 6}),
    ("glm_moe_dsa", {"index_topk_freq": 0, "index_skip_topk_offset": 1}),
    ("glm_moe_dsa", {"index_topk_freq": 3, "index_skip_topk_offset": 1}),
    ("ministral3", {"sliding_window": 8, "num_key_value_heads": 1}),
    ("ministral3", {"sliding_window": 8, "layer_types": [SLIDING, FULL, FULL, SLIDING]}),
    ("ministral3", {"rope_parameters": QUERIES, "head_dim": 12}),
    ("ministral3", {"rope_parameters": {**QUERIES, "rope_type": "default"}}),
    ("mistral4", {"first_k_dense_replace": 2, "q_lora_rank": None, "attention_bias": True}),
    ("mistral4", {"num_key_value_heads": None, "rope_interleave": False, "head_dim": 12}),
    ("mistral4", {"rope_parameters": QUERIES, "architectures": ["Mistral4Model"]}),
    ("mistral4", {"rope_parameters": QUERIES, "partial_rotary_factor": 0.5}),
    ("mistral4", {"rope_scaling": QUERIES, "partial_rotary_factor": 4 / 12}),
    ("mistral4", {"rope_scaling": {**QUERIES, "partial_rotary_factor": 4 / 12}}),
    ("mistral4", {"rope_parameters": {**QUERIES, "rope_type": "default"}, "head_dim": 4}),
]
by_variant = pytest.mark.parametrize(
    ("kind", "change"), VARIANTS, ids=[f"{i} {kind}" for i, (kind, _) in enumerate(VARIANTS)]
)


def tiny(kind: str, **change: Any) -> dict[str, Any]:
    return copy.deepcopy({"model_type": kind, **TINY[kind], **change})  # configs are written to


def assert_same_cache(model: planner.Model, live: Any, batch: int, tokens: int) -> None:
    expected = live_cache_bytes(live_prefill(live, batch, tokens))
    got = kv_cache_bytes(model, batch=batch, context_tokens=tokens, dtype="bf16")
    assert got == expected, (batch, tokens)


@by_variant
def test_parameters_positions_scales_and_cache_are_those_of_the_class(kind, change):
    config = tiny(kind, **change)
    model, live = planner.read_config(config), live_model(config)
    assert_same_parameters(model, live)
    for batch, tokens in ((3, 7), (2, 9)):  # a window of 8 keeps 7
        assert_same_cache(model, live, batch, tokens)
    if kind == "deepseek_v4":
        return  # positions of two kinds, see below
    rotary = getattr(live, "model", live).rotary_emb
    assert model.positions.rotary_dim == 2 * rotary.inv_freq.numel()
    assert model.positions.rope_type == live.config.rope_parameters["rope_type"]
    assert model.positions.rope_theta == live.config.rope_parameters["rope_theta"]
    modules = [m for m in live.modules() if type(m).__name__.endswith("Attention")]
    for layer, module in zip(model.layers, modules, strict=True):
        assert layer.attention.scaling == pytest.approx(module.scaling)


WHOLE, QUARTER = {"partial_rotary_factor": 1.0}, {"partial_rotary_factor": 0.25}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"rope_scaling": {**YARN, "type": "yarn"}, "rope_theta": 7, "compress_rope_theta": 9.0},
        {"qk_rope_head_dim": None, "head_dim": 32},
        {"partial_rotary_factor": 0.5},
        {"rope_parameters": {"main": WHOLE, "compress": {**QUARTER, "rope_theta": 5.0}}},
        {
            "rope_parameters": {
                "main": {"rope_theta": 3.0, **QUARTER},
                "compress": {**YARN, **WHOLE},
            }
        },
        {"rope_parameters": {"main": WHOLE, "compress": YARN}, "partial_rotary_factor": 0.5},
    ],
)
def test_compressing_layers_have_positions_of_their_own(change):
    config = tiny("deepseek_v4", **{"index_head_dim": 16, **change})
    model, live = planner.read_config(config), live_model(config)
    rotary = live.model.rotary_emb
    for name, ours in (("main", model.local_positions), ("compress", model.positions)):
        theirs = live.config.rope_parameters[name]
        assert ours is not None
        assert ours.rotary_dim == 2 * getattr(rotary, f"{name}_inv_freq").numel()
        assert (ours.rope_type, ours.rope_theta) == (theirs["rope_type"], theirs["rope_theta"])


@pytest.mark.parametrize("kind", TINY)
def test_absent_fields_take_the_defaults_of_their_class(kind):
    config = {"model_type": kind, "num_hidden_layers": 4}
    if kind == "mistral4":
        config["architectures"] = ["Mistral4ForCausalLM"]
    assert_same_parameters(planner.read_config(config), live_model(config))


@given(data=st.data())
@examples(30)
def test_random_configs_have_the_parameters_and_caches_of_their_class(data):
    draw = data.draw
    kind = draw(st.sampled_from(sorted(TINY)))
    layers, flag = draw(st.integers(1, 5)), st.booleans()
    heads = draw(st.integers(1, 4))
    rotary = 2 * draw(st.integers(1, 3))
    config = tiny(
        kind,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1 if kind == "ministral3" else heads,
        hidden_size=draw(st.integers(1, 40)),
        intermediate_size=draw(st.integers(1, 40)),
        moe_intermediate_size=draw(st.integers(1, 40)),
        vocab_size=draw(st.integers(12, 50)),
        tie_word_embeddings=draw(flag),
        attention_bias=draw(flag),
    )
    if kind != "ministral3":
        config |= {
            "qk_rope_head_dim": rotary,
            "qk_nope_head_dim": rotary * draw(st.integers(1, 3)),
            "v_head_dim": draw(st.integers(1, 9)),
            "kv_lora_rank": draw(st.integers(1, 20)),
            "q_lora_rank": draw(st.integers(1, 20)),
            "n_shared_experts": draw(st.integers(1, 3)),
            "first_k_dense_replace": draw(st.integers(0, 6)),
        }
    if "index_topk" in config:
        config |= {
            "index_head_dim": rotary + draw(st.integers(0, 5)),
            "index_n_heads": draw(st.integers(1, 4)),
            "index_topk": draw(st.integers(1, 30)),
            "index_topk_freq": draw(st.integers(0, 4)),
            "index_skip_topk_offset": draw(st.integers(1, 4)),
        }
    if kind == "deepseek_v4":
        config |= {
            "head_dim": 2 * rotary,
            "compress_ratios": draw(st.lists(st.sampled_from([0, 4, 128]), min_size=5)),
            "compress_rate_csa": draw(st.integers(1, 9)),
            "compress_rate_hca": draw(st.integers(1, 30)),
            "sliding_window": draw(st.integers(1, 30)),
            "o_groups": heads,
            "o_lora_rank": draw(st.integers(1, 5)),
            "hc_mult": draw(st.integers(1, 4)),
        }
    if kind == "ministral3":
        config["sliding_window"] = draw(st.sampled_from([None, 2, 5, 20]))
    model, live = planner.read_config(config), live_model(config)
    assert_same_parameters(model, live)
    assert_same_cache(model, live, draw(st.integers(1, 3)), draw(st.integers(1, 24)))


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "deepseek_v4"])
def test_a_static_cache_is_allocated_for_its_capacity(kind):
    config = tiny(kind)
    model, live = planner.read_config(config), live_model(config)
    expected = live_cache_bytes(live_prefill(live, 2, 11, static=True))
    spec = CacheSpec(kind="static", capacity_tokens=11)
    got = kv_cache_bytes(model, batch=2, context_tokens=5, dtype="bf16", cache=spec)
    assert got == expected


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "ministral3"])
def test_active_parameters_are_those_of_the_picked_experts(kind):
    assert_half_of_the_experts_are_idle(tiny(kind), live_model(tiny(kind)))


def assert_half_of_the_experts_are_idle(config: dict[str, Any], live: Any) -> None:
    idle = sum(p.numel() // 2 for name, p in live.named_parameters() if ".experts." in name)
    model = planner.read_config(config)
    assert idle > 0
    assert model.active_parameter_count == model.parameter_count - idle


def test_compressed_entries_have_no_static_cache():
    model = planner.read_config(tiny("deepseek_v4"))
    with pytest.raises(ConfigError, match=r"cache\.kind='static' is not allowed"):
        kv_cache_bytes(model, batch=1, context_tokens=4, cache=CacheSpec(kind="static"))


@pytest.mark.parametrize("kind", ["deepseek_v32", "deepseek_v4", "glm_moe_dsa"])
def test_estimates_refuse_what_no_program_runs(kind):
    model = planner.read_config(tiny(kind))
    message = "runtime=vllm does not" if kind == "deepseek_v4" else "has a sparse kernel for: 512"
    for runtime, reason in (("attnlab", "runtime=attnlab does not"), ("vllm", message)):
        with pytest.raises(ConfigError, match=reason):
            kv_cache_bytes(model, batch=1, context_tokens=4, runtime=runtime)


NO_BETA = {key: value for key, value in QUERIES.items() if key != "llama_4_scaling_beta"}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank is missing"),
        ("deepseek_v32", {"layer_types": [FULL] * 4}, "layer_types has 'full_attention': one of"),
        ("deepseek_v32", {"mlp_layer_types": [DENSE] * 5}, "mlp_layer_types=.* a list of 4 words"),
        ("deepseek_v32", {"mlp_layer_types": ["moe"] * 4}, "mlp_layer_types has 'moe'"),
        ("deepseek_v32", {"index_head_dim": 2}, "index_head_dim=2 is less than qk_rope_head_dim=4"),
        ("deepseek_v32", {"num_key_value_heads": 2}, "num_key_value_heads=2 is not allowed"),
        ("deepseek_v32", {"n_group": 4}, "n_group=4 is not allowed: groups of two"),
        ("deepseek_v32", {"rope_scaling": {"type": "yarn"}}, "factor=None is not allowed"),
        ("deepseek_v32", {"rope_scaling": YARN, "partial_rotary_factor": 0.5}, "=0.5 is not"),
        ("deepseek_v32", {"first_k_dense_replace": -1}, "first_k_dense_replace=-1 is not"),
        ("deepseek_v4", {"compress_ratios": [0, 4, 8, 4]}, "compress_ratios has 8: one of 0, 4"),
        ("deepseek_v4", {"compress_ratios": [4]}, r"compress_ratios=\[4\] is not allowed: a list"),
        ("deepseek_v4", {"layer_types": [FULL] * 4}, "layer_types has 'full_attention': one of"),
        ("deepseek_v4", {"mlp_layer_types": [DENSE] * 4}, "mlp_layer_types has 'dense': one of"),
        ("deepseek_v4", {"compress_rates": {CHOSEN: 4}}, f"compress_rates.{HEAVY}=None is not"),
        ("deepseek_v4", {"compress_rate_csa": 0}, f"compress_rates.{CHOSEN}=0 is not allowed"),
        ("deepseek_v4", {"compress_rates": 4}, "compress_rates=4 is not allowed: an object"),
        ("deepseek_v4", {"num_hash_layers": -1}, "num_hash_layers=-1 is not allowed"),
        ("deepseek_v4", {"scoring_func": "softmax"}, "scoring_func='softmax' is not allowed"),
        ("deepseek_v4", {"o_groups": 3}, "= 64 is not a multiple of o_groups=3"),
        ("deepseek_v4", {"index_head_dim": 2}, "index_head_dim=2 is less than the 4 rotary"),
        ("deepseek_v4", {"sliding_window": None}, "sliding_window is missing"),
        (
            "deepseek_v4",
            {"rope_parameters": {"main": {}, "compress": {}}},
            "rope_parameters.main.partial_rotary_factor=None is not allowed",
        ),
        ("deepseek_v4", {"rope_scaling": {"type": "yarn"}}, "factor=None is not allowed"),
        ("glm4_moe_lite", {"sliding_window": 4}, "sliding_window=4 is not allowed: null"),
        ("glm4_moe_lite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not"),
        ("glm4_moe_lite", {"mlp_layer_types": [DENSE] * 3}, "mlp_layer_types=.* a list of 4"),
        ("glm4_moe_lite", {"layer_types": [SLIDING] * 4}, "layer_types has 'sliding_attention'"),
        ("glm_moe_dsa", {"indexer_types": ["shared"] * 4}, r"indexer_types\[0\]='shared'"),
        ("glm_moe_dsa", {"indexer_types": ["some"] * 4}, "indexer_types has 'some'"),
        ("glm_moe_dsa", {"index_topk_pattern": "FFX?"}, "index_topk_pattern has 'X'"),
        ("glm_moe_dsa", {"index_topk_pattern": "FF"}, "index_topk_pattern=.* a list of 4"),
        ("glm_moe_dsa", {"index_topk_freq": None}, "index_topk_freq=None is not allowed"),
        ("glm_moe_dsa", {"index_topk_freq": 2, "index_skip_topk_offset": 0}, "first layer is full"),
        ("ministral3", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ("ministral3", {"rope_parameters": NO_BETA}, "llama_4_scaling_beta=None is not allowed"),
        (
            "ministral3",
            {"rope_scaling": {"rope_type": "default", "llama_4_scaling_beta": 0}},
            "original_max_position_embeddings=None is not allowed",
        ),
        ("mistral4", {"head_dim": 24}, "give 8 rotary dimensions: qk_rope_head_dim=4"),
        ("mistral4", {"rope_scaling": QUERIES}, "give 12 rotary dimensions: qk_rope_head_dim=4"),
        ("mistral4", {"first_k_dense_replace": None}, "first_k_dense_replace is missing"),
        ("mistral4", {"architectures": ["Mistral4ForTokenClassification"]}, "is not read yet"),
    ],
)
def test_a_value_that_is_not_read_is_refused_by_name(kind, change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        planner.read_config(tiny(kind, **change))
    assert "\n" not in str(caught.value)
