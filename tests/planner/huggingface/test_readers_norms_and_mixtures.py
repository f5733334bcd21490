"""Oracle: the modules and caches of transformers, built on the meta device."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError, kv_cache_bytes
from planner.layers import GQA, MoE
from planner.runtimes.transformers import Transformers
from tests.planner.configs import BASE, build
from tests.planner.test_kv_cache import cache_bytes, prefill
from tests.planner.test_parameters import our_parameters
from tests.properties import examples

SLIDING, FULL = "sliding_attention", "full_attention"
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ERNIE_MIXTURE = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}
OLMO = {"pad_token_id": 1, "eos_token_id": 2}
SMOL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen3 biased, wide, a window that is off": {
        "attention_bias": True,
        "head_dim": 24,
        "sliding_window": 8,
        "tie_word_embeddings": True,
    },
    "qwen3 sliding from layer 1": {
        "head_dim": 16,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 1,
    },
    "qwen3 with layer types": {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": [SLIDING, FULL, SLIDING],
    },
    "qwen3_moe": {**MIXTURE},
    "qwen3_moe every other, one dense, sliding": {
        **MIXTURE,
        "num_hidden_layers": 5,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 8,
        "norm_topk_prob": True,
    },
    "qwen3_moe without experts": {**MIXTURE, "num_experts": 0},
    "qwen3_moe with local experts": {
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
    },
    "qwen2_moe": {**MIXTURE, "shared_expert_intermediate_size": 40},
    "qwen2_moe sliding before layer 3": {
        **MIXTURE,
        "shared_expert_intermediate_size": 40,
        "num_hidden_layers": 5,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 3,
        "qkv_bias": False,
        "mlp_only_layers": [0],
    },
    "gemma": {"hidden_act": "gelu"},
    "gemma biased, untied": {
        "head_dim": 24,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "num_key_value_heads": 1,
    },
    "gemma3_text": {"num_hidden_layers": 7, "head_dim": 16, "sliding_window": 8},
    "gemma3_text by a pattern": {
        "num_hidden_layers": 5,
        "sliding_window_pattern": 2,
        "sliding_window": 8,
        "attention_bias": True,
        "rope_theta": 5000.0,
        "rope_local_base_freq": 700.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3_text with layer types": {"sliding_window": 8, "layer_types": [FULL, SLIDING, FULL]},
    "olmo": {**OLMO},
    "olmo MHA, clipped": {**OLMO, "num_key_value_heads": None, "clip_qkv": 8.0},
    "olmo2": {**OLMO},
    "olmo2 biased, wide": {**OLMO, "attention_bias": True, "head_dim": 24},
    "olmo3": {**OLMO, "num_hidden_layers": 5, "sliding_window": 8},
    "olmo3 with layer types": {
        **OLMO,
        "sliding_window": 8,
        "layer_types": [FULL, SLIDING, FULL],
        "rope_theta": 700.0,
    },
    "olmoe": {**OLMO, "num_experts": 4, "num_experts_per_tok": 2},
    "olmoe biased": {
        **OLMO,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "norm_topk_prob": True,
        "clip_qkv": 4.0,
    },
    "smollm3": {**SMOL, "num_hidden_layers": 5},
    "smollm3 sliding, biased": {
        **SMOL,
        "no_rope_layers": [1, 0, 1, 1],
        "use_sliding_window": True,
        "sliding_window": 8,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
    },
    "smollm3 with layer types, its window off": {
        **SMOL,
        "sliding_window": 8,
        "layer_types": [SLIDING, FULL, SLIDING],
    },
    "granite": {"num_key_value_heads": None},
    "granite biased, scaled": {
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
        "embedding_multiplier": 12,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0625,
    },
    "granitemoe": {},
    "granitemoe biased": {"num_local_experts": 3, "attention_bias": True},
    "seed_oss": {},
    "seed_oss other biases": {
        "attention_bias": False,
        "attention_out_bias": True,
        "mlp_bias": True,
        "head_dim": None,
        "num_key_value_heads": None,
    },
    "ernie4_5": {},
    "ernie4_5 biased, untied": {
        "use_bias": True,
        "tie_word_embeddings": False,
        "head_dim": None,
    },
    "ernie4_5_moe": {**ERNIE_MIXTURE},
    "ernie4_5_moe biased, between layers": {
        **ERNIE_MIXTURE,
        "num_hidden_layers": 8,
        "use_bias": True,
        "moe_layer_start_index": 2,
        "moe_layer_end_index": 6,
        "moe_layer_interval": 2,
        "moe_num_shared_experts": 0,
    },
    "ernie4_5_moe untied, biased": {
        **ERNIE_MIXTURE,
        "use_bias": True,
        "tie_word_embeddings": False,
    },
    "granite with a stray window": {"sliding_window": 8},
}


def config_of(name: str) -> dict[str, Any]:
    return {**BASE, "model_type": name.split()[0].rstrip(","), **CONFIGS[name]}


TYPES = sorted({name.split()[0] for name in CONFIGS})


@cache
def live_model(name: str) -> Any:
    return build(config_of(name))


def check_parameters(config: dict[str, Any], live: Any) -> None:
    model = planner.read_config(config)
    named = dict(live.named_parameters())
    assert our_parameters(model) == {name: tuple(p.shape) for name, p in named.items()}
    assert model.parameter_count == sum(p.numel() for p in named.values())


def check_cache(config: dict[str, Any], live: Any, batch: int, *lengths: int) -> None:
    model = planner.read_config(config)
    for tokens in lengths:
        expected = cache_bytes(prefill(live, batch, tokens))
        got = kv_cache_bytes(model, batch=batch, context_tokens=tokens, dtype="bf16")
        assert got == expected, tokens


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_class(name):
    check_parameters(config_of(name), live_model(name))


@pytest.mark.parametrize("name", CONFIGS)
def test_caches_are_those_of_the_class_around_the_window(name):
    lengths = (1, 7) if "stray" in name else (7, 9)  # no mask of that class has a window
    check_cache(config_of(name), live_model(name), 3, *lengths)


@pytest.mark.parametrize("kind", TYPES)
def test_absent_fields_take_the_defaults_of_their_class(kind):
    config = {"model_type": kind, "num_hidden_layers": 2}
    check_parameters(config, build(config))
    assert planner.read_config(config).defaults


@pytest.mark.parametrize("kind", TYPES)
@given(data=st.data())
@examples(6)
def test_random_configs_are_those_of_their_class(kind, data):
    draw = data.draw
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    heads, layers = kv_heads * groups, draw(st.integers(1, 5))
    config = {
        **BASE,
        "model_type": kind,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_size": 8 * heads,
        "num_hidden_layers": layers,
        "intermediate_size": draw(st.integers(1, 50)),
        "vocab_size": draw(st.integers(4, 90)),
        "pad_token_id": 0,
        "tie_word_embeddings": draw(st.booleans()),
    }
    flags = {"attention_bias", "mlp_bias", "use_bias", "qkv_bias", "attention_out_bias"}
    for flag in sorted(flags):
        if draw(st.booleans()):
            config[flag] = draw(st.booleans())
    if kind != "olmoe" and draw(st.booleans()):
        config["head_dim"] = 2 * draw(st.integers(1, 9))
    if kind in ("qwen3", "qwen3_moe", "qwen2_moe", "smollm3"):
        config["use_sliding_window"] = draw(st.booleans())
        config["max_window_layers"] = draw(st.integers(0, 6))
    if kind in ("qwen3", "qwen3_moe", "qwen2_moe", "smollm3", "gemma3_text", "olmo3"):
        config["sliding_window"] = draw(st.integers(1, 12))
    experts = draw(st.integers(2, 6))
    k = draw(st.integers(1, experts))
    width = draw(st.integers(1, 20))
    if kind == "ernie4_5_moe":
        config |= {"moe_num_experts": experts, "moe_k": k, "moe_intermediate_size": width}
        config["moe_num_shared_experts"] = draw(st.integers(0, 3))
        config["moe_layer_start_index"] = draw(st.integers(0, 3))
        config["moe_layer_end_index"] = draw(st.integers(-1, 5))
        config["moe_layer_interval"] = draw(st.integers(1, 3))
    elif kind in ("qwen3_moe", "qwen2_moe"):
        config |= {"num_experts": experts, "num_experts_per_tok": k, "moe_intermediate_size": width}
        config["decoder_sparse_step"] = draw(st.integers(1, 3))
        config["mlp_only_layers"] = draw(st.lists(st.integers(0, 5), max_size=2))
        config["shared_expert_intermediate_size"] = width + 3
    elif kind in ("olmoe", "granitemoe"):
        config |= {"num_local_experts": experts, "num_experts_per_tok": k}
    if kind == "smollm3":
        config["no_rope_layer_interval"] = draw(st.integers(1, 5))
    live = build(config)
    check_parameters(config, live)
    check_cache(config, live, draw(st.integers(1, 3)), draw(st.integers(1, 24)))


@pytest.mark.parametrize("name", CONFIGS)
def test_rotary_positions_are_those_of_the_config_class(name):
    config = config_of(name)
    live, model = live_model(name).config, planner.read_config(config)
    kinds = {None: model.positions}
    if model.local_positions is not None:
        kinds = {FULL: model.positions, SLIDING: model.local_positions}
    for kind, rope in kinds.items():
        expected = dict(live.rope_parameters[kind] if kind else live.rope_parameters)
        got = {"rope_theta": rope.rope_theta, "rope_type": rope.rope_type, **dict(rope.scaling)}
        assert got == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_windows_and_positions_are_those_of_every_attention(name):
    live, model = live_model(name), planner.read_config(config_of(name))
    for block, layer in zip(live.model.layers, model.layers, strict=True):
        attention, theirs = layer.attention, block.self_attn
        assert isinstance(attention, GQA)
        assert attention.scaling == theirs.scaling
        assert attention.rope == bool(getattr(theirs, "use_rope", True))
        if hasattr(theirs, "sliding_window") and "its window off" not in name:
            assert attention.sliding_window == theirs.sliding_window
        assert layer.residual_multiplier == getattr(block, "residual_multiplier", None)
        mlp = getattr(block, "mlp", None) or block.block_sparse_moe
        routed = isinstance(layer.feed_forward, MoE)
        assert routed == hasattr(mlp, "experts")
    scale = getattr(live.model.embed_tokens, "scalar_embed_scale", None)
    assert model.embedding_scale == getattr(live.model, "embedding_multiplier", scale)


@pytest.mark.parametrize("name", CONFIGS)
def test_weight_bytes_are_those_of_the_class(name):
    model, live = planner.read_config(config_of(name)), live_model(name)
    rows = Transformers().buffer_rows(model, dtype="bf16")
    held = (*live.parameters(), *live.buffers())  # routers that stay float32 among them
    expected = sum(t.numel() * t.element_size() for t in held)
    assert 2 * model.parameter_count + sum(row.size_bytes for row in rows) == expected


@pytest.mark.parametrize("name", [n for n in CONFIGS if "moe" in n and "without" not in n])
def test_active_parameters_leave_idle_experts_out(name):
    model = planner.read_config(config_of(name))
    idle = 0
    for layer in model.layers:
        if isinstance(moe := layer.feed_forward, MoE):
            spare = moe.num_experts - moe.num_experts_per_tok
            idle += spare * 3 * moe.moe_intermediate_size * model.hidden_size
    assert 0 < idle == model.parameter_count - model.active_parameter_count


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("qwen3", {"head_dim": None}, "head_dim"),
        ("qwen3", {"layer_types": [SLIDING] * 3}, "sliding_window=None"),
        ("qwen3", {"layer_types": ["chunked"] * 3}, "chunked"),
        ("qwen3_moe", {**MIXTURE, "num_experts": 1}, "num_experts_per_tok=2 is more than"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers='all'"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ("qwen2_moe", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ("qwen2_moe", {"use_sliding_window": True, "sliding_window": None}, "sliding_window"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"sliding_window_pattern": "LLG"}, "sliding_window_pattern='LLG'"),
        ("gemma3_text", {"num_attention_heads": 6}, "hidden_size=64 is not a multiple"),
        ("gemma3_text", {"rope_parameters": {FULL: "yarn"}}, "rope_parameters has 'yarn'"),
        ("olmo", {"clip_qkv": -1.0}, r"clip_qkv=-1\.0"),
        ("olmo3", {"sliding_window": None}, "sliding_window"),
        ("olmoe", {"head_dim": 24}, "head_dim=24"),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers=\[1\]"),
        ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
        ("granite", {"residual_multiplier": None}, "residual_multiplier is missing"),
        ("granitemoe", {"num_local_experts": 0}, "num_local_experts=0"),
        ("seed_oss", {"attention_out_bias": 3}, "attention_out_bias=3"),
        ("ernie4_5", {"hidden_act": "swish9"}, "hidden_act='swish9'"),
        ("ernie4_5_moe", {"moe_layer_end_index": -2}, "moe_layer_end_index=-2"),
    ],
)
def test_values_out_of_range_are_refused(kind, change, message):
    with pytest.raises(ConfigError, match=message) as refusal:
        planner.read_config({**BASE, "model_type": kind, **change})
    assert "\n" not in str(refusal.value)
