"""Oracle: the modules and the caches that transformers makes on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel

import planner
from planner import ConfigError, kv_cache_bytes
from planner.runtimes.transformers import WINDOWED
from tests.planner.configs import BASE, build
from tests.planner.test_kv_cache import cache_bytes, prefill
from tests.planner.test_parameters import our_parameters
from tests.properties import examples

N: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 90}
B: dict[str, Any] = {**BASE, "num_hidden_layers": 2, "pad_token_id": 0}
B4: dict[str, Any] = {k: v for k, v in B.items() if k != "num_key_value_heads"}
OPT: dict[str, Any] = {**B4, "ffn_dim": 96}
MPT: dict[str, Any] = {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 90}
NEO: dict[str, Any] = {
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "vocab_size": 90,
    "attention_types": [[["global", "local"], 1], [["local"], 1]],
    "window_size": 8,
    "max_position_embeddings": 128,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox": ("gpt_neox", {**B4, "rotary_pct": 0.5, "rotary_emb_base": 5000}),
    "gpt_neox one after the other, no biases, tied": (
        "gpt_neox",
        {
            **B4,
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_neox with a stray window": ("gpt_neox", {**B4, "sliding_window": 16}),
    "gptj": ("gptj", {**N, "rotary_dim": 8}),
    "gptj tied, own width": (
        "gptj",
        {**N, "rotary_dim": 16, "n_inner": 48, "tie_word_embeddings": True},
    ),
    "phi": ("phi", B),
    "phi mha": ("phi", {**B, "num_key_value_heads": None, "partial_rotary_factor": 0.25}),
    "phi qk norm, tied": ("phi", {**B, "qk_layernorm": True, "tie_word_embeddings": True}),
    "phi wide heads": ("phi", {**B, "head_dim": 24}),
    "phi with layer types": (
        "phi",
        {**B, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "falcon 7b": ("falcon", B4),
    "falcon 40b": ("falcon", {**B4, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 11b": (
        "falcon",
        {
            **B4,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
        },
    ),
    "falcon new, all heads": ("falcon", {**B4, "new_decoder_architecture": True, "bias": True}),
    "falcon rw": (
        "falcon",
        {**B4, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "falcon n_embed, own width": ("falcon", {**B4, "n_embed": 32, "ffn_hidden_size": 50}),
    "bloom": ("bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 90}),
    "bloom n_embed, untied": (
        "bloom",
        {"n_embed": 32, "num_hidden_layers": 3, "n_head": 2, "tie_word_embeddings": False},
    ),
    "opt": ("opt", OPT),
    "opt 350m": ("opt", {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "opt bare": (
        "opt",
        {
            **OPT,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "tie_word_embeddings": False,
            "word_embed_proj_dim": 80,
        },
    ),
    "opt without its last norm": ("opt", {**OPT, "_remove_final_layer_norm": True}),
    "mpt": ("mpt", MPT),
    "mpt storywriter": (
        "mpt",
        {
            **MPT,
            "attn_config": {"clip_qkv": 6.0, "softmax_scale": 0.5, "alibi": True},
            "tie_word_embeddings": False,
            "expansion_ratio": 2,
            "no_bias": False,
        },
    ),
    "gpt_bigcode": ("gpt_bigcode", N),
    "gpt_bigcode mha": (
        "gpt_bigcode",
        {**N, "multi_query": False, "n_inner": 70, "tie_word_embeddings": False},
    ),
    "starcoder2": ("starcoder2", {**B, "sliding_window": 16}),
    "starcoder2 no biases, wide heads": (
        "starcoder2",
        {**B, "use_bias": False, "head_dim": 24, "tie_word_embeddings": False},
    ),
    "stablelm": ("stablelm", {**B, "use_qkv_bias": True}),
    "stablelm 12b": (
        "stablelm",
        {
            **B,
            "qk_layernorm": True,
            "use_parallel_residual": True,
            "partial_rotary_factor": 0.5,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_neo": ("gpt_neo", NEO),
    "gpt_neo untied, own width": (
        "gpt_neo",
        {**NEO, "tie_word_embeddings": False, "intermediate_size": 70},
    ),
}
TYPES = sorted({kind for kind, _ in CASES.values()})


def check_parameters(config: dict[str, Any]) -> tuple[planner.Model, Any]:
    model, live = planner.read_config(config), build(config)
    assert our_parameters(model) == {n: tuple(p.shape) for n, p in live.named_parameters()}
    assert model.parameter_count == sum(p.numel() for p in live.parameters())
    assert model.active_parameter_count == model.parameter_count
    return model, live


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_caches_are_those_of_the_class(name):
    kind, fields = CASES[name]
    config = {**fields, "model_type": kind}
    model, live = check_parameters(config)
    for batch, tokens in ((3, 1), (2, 15), (1, 16), (2, 17), (1, 40)):
        expected = cache_bytes(prefill(live, batch, tokens))
        got = kv_cache_bytes(model, batch=batch, context_tokens=tokens, dtype="bf16")
        assert got == expected, (batch, tokens)


@pytest.mark.parametrize("kind", TYPES)
def test_absent_fields_take_the_defaults_of_the_class(kind):
    check_parameters({"model_type": kind})


FLAGS = {
    "gpt_neox": ("attention_bias", "use_parallel_residual"),
    "phi": ("qk_layernorm",),
    "falcon": ("bias", "alibi", "new_decoder_architecture", "multi_query"),
    "opt": (
        "enable_bias",
        "do_layer_norm_before",
        "layer_norm_elementwise_affine",
        "_remove_final_layer_norm",
    ),
    "gpt_bigcode": ("multi_query", "scale_attn_weights"),
    "starcoder2": ("use_bias",),
    "stablelm": ("use_qkv_bias", "qk_layernorm", "use_parallel_residual"),
}
WIDTHS = {
    "gpt_neox": "intermediate_size",
    "gptj": "n_inner",
    "phi": "intermediate_size",
    "falcon": "ffn_hidden_size",
    "opt": "ffn_dim",
    "gpt_bigcode": "n_inner",
    "starcoder2": "intermediate_size",
    "stablelm": "intermediate_size",
    "gpt_neo": "intermediate_size",
}


@given(data=st.data())
@examples(60)
def test_random_configs_are_read_as_their_class_reads_them(data):
    draw = data.draw
    kind = draw(st.sampled_from(TYPES))
    kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    short = kind in ("gptj", "gpt_bigcode")
    hidden = heads * 8 * draw(st.integers(1, 3))
    config = {
        "model_type": kind,
        {"mpt": "d_model"}.get(kind, "n_embd" if short else "hidden_size"): hidden,
        {"mpt": "n_heads", "gpt_neo": "num_heads"}.get(
            kind, "n_head" if short else "num_attention_heads"
        ): heads,
        {"mpt": "n_layers", "gpt_neo": "num_layers"}.get(
            kind, "n_layer" if short else "num_hidden_layers"
        ): layers,
        "vocab_size": draw(st.integers(4, 90)),
        "pad_token_id": 0,
        "tie_word_embeddings": draw(st.booleans()),
        **{flag: draw(st.booleans()) for flag in FLAGS.get(kind, ())},
    }
    if kind in WIDTHS:
        config[WIDTHS[kind]] = draw(st.integers(1, 50))
    if kind in ("phi", "starcoder2", "stablelm"):
        config["num_key_value_heads"] = kv_heads
    if kind == "starcoder2":
        config["head_dim"] = 2 * draw(st.integers(1, 9))
        config["sliding_window"] = draw(st.sampled_from([None, 1, 5, 16]))
    if kind == "opt":
        config["word_embed_proj_dim"] = draw(st.sampled_from([None, 8, 12]))
    if kind == "gptj":
        config["rotary_dim"] = draw(st.sampled_from([2, 8]))
    if kind == "gpt_neo":
        config["attention_types"] = [[["local"], layers]]
    if kind == "falcon" and config["new_decoder_architecture"]:
        config["num_kv_heads"] = kv_heads
        config["num_ln_in_parallel_attn"] = draw(st.sampled_from([None, 1, 2]))
    elif kind == "falcon":
        config["parallel_attn"] = draw(st.booleans())
    model, live = check_parameters(config)
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 30))
    expected = cache_bytes(prefill(live, batch, tokens))
    assert kv_cache_bytes(model, batch=batch, context_tokens=tokens, dtype="bf16") == expected


@pytest.mark.parametrize("kind", ["gpt_neox", "opt", "falcon", "gptj"])
def test_the_bare_model_has_its_own_names(kind):
    fields = next(fields for k, fields in CASES.values() if k == kind)
    described = AutoConfig.for_model(kind, **fields)
    with torch.device("meta"):
        live = AutoModel.from_config(described)
    config = {**fields, "model_type": kind, "architectures": [type(live).__name__]}
    expected = {n: tuple(p.shape) for n, p in live.named_parameters()}
    assert our_parameters(planner.read_config(config)) == expected


def test_what_a_class_sets_in_code_is_listed_as_a_default():
    assert "partial_rotary_factor=0.5" in planner.read_config({"model_type": "phi"}).defaults
    neox = planner.read_config({"model_type": "gpt_neox", "rotary_emb_base": 500})
    assert neox.positions.rope_theta == 500
    assert neox.positions.rotary_dim == 24  # a quarter of 96
    assert not any(d.startswith("rope_theta") for d in neox.defaults)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("gpt_neox", {"num_attention_heads": 7}, "hidden_size=6144 is not a multiple"),
        ("gpt_neox", {"head_dim": 8}, "head_dim=8 is not allowed"),
        ("gptj", {"rotary_dim": 63}, "rotary_dim=63 is not allowed"),
        ("gptj", {"rotary_dim": 512}, "rotary_dim=512 is not allowed"),
        ("phi", {"hidden_act": "mish"}, "hidden_act='mish' is not allowed"),
        ("phi", {"qk_layernorm": True, "head_dim": 16}, "head_dim=16 is not allowed"),
        ("falcon", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads=2 is not allowed"),
        (
            "falcon",
            {"new_decoder_architecture": True, "parallel_attn": False},
            "parallel_attn=False is not allowed",
        ),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2 is not allowed"),
        ("falcon", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn=3 is not allowed"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "is not read yet: false"),
        ("opt", {"ffn_dim": 0}, "ffn_dim=0 is not allowed"),
        ("opt", {"enable_bias": 3}, "enable_bias=3 is not allowed"),
        ("mpt", {"attn_config": 3}, "attn_config=3 is not allowed"),
        ("mpt", {"attn_config": {"alibi": False}}, r"attn_config\.alibi=False is not read"),
        ("mpt", {"attn_config": {"clip_qkv": "six"}}, "clip_qkv='six' is not allowed"),
        ("gpt_bigcode", {"add_cross_attention": True}, "add_cross_attention=True is not read"),
        ("starcoder2", {"num_key_value_heads": 5}, "is not a multiple of num_key_value_heads=5"),
        ("stablelm", {"partial_rotary_factor": 2}, "partial_rotary_factor=2.0 is not allowed"),
        ("gpt_neo", {"num_layers": 3}, "attention_types="),
        ("gpt_neo", {"attention_types": [[["far"], 24]]}, "attention_types="),
        ("gpt_neo", {"attention_types": 7}, "attention_types=7 is not allowed"),
    ],
)
def test_bad_values_are_refused_by_name(kind, change, message):
    with pytest.raises(ConfigError, match=message):
        planner.read_config({"model_type": kind, **change})


@pytest.mark.parametrize("name", CASES)
def test_every_case_is_planned(name):
    kind, fields = CASES[name]
    model = planner.read_config({**fields, "model_type": kind})
    work = planner.Inference(batch=2, prompt_tokens=20, output_tokens=5)
    stray = any(x.attention.sliding_window for x in model.layers) and kind not in WINDOWED
    for runtime in ("transformers", "vllm"):
        deploy = planner.Deployment(gpu="h100-80gb", runtime=runtime)
        if stray and runtime == "transformers":
            with pytest.raises(ConfigError, match="clips the cache and masks nothing"):
                planner.estimate(model, work, deploy)
        else:
            assert planner.estimate(model, work, deploy).memory.total_bytes > 0


def test_local_layers_of_gpt_neo_mask_without_clipping():
    model = planner.read_config({**NEO, "model_type": "gpt_neo"})
    assert [layer.attention.masked_window for layer in model.layers] == [None, 8, 8]
    assert all(layer.attention.sliding_window is None for layer in model.layers)
    whole = kv_cache_bytes(model, batch=1, context_tokens=20, runtime="attnlab")
    assert whole == 2 * len(model.layers) * model.hidden_size * 20 * 2
