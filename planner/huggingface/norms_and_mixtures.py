"""Readers of the OLMo, Granite, SmolLM3, Seed-OSS and Ernie 4.5 families (transformers 5.23)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.errors import ConfigError, check_size, shown
from planner.huggingface.blocks import (
    LLAMA_NAMES,
    activation,
    gated,
    gqa,
    gqa_decoder,
    heads,
    layer_count,
    layer_windows,
    rmsnorm,
    rope,
    stray_windows,
)
from planner.huggingface.fields import Fields
from planner.huggingface.mixed import decoder, required_kv_heads, rope_by_kind, windowed
from planner.layers import GQA, Dense, MoE, Norm, QKNorm
from planner.model import Model

GRANITEMOE_NAMES = (
    *LLAMA_NAMES,
    ("mlp.gate", "block_sparse_moe.router"),
    ("mlp.experts", "block_sparse_moe.experts"),
)
ERNIE_MOE_NAMES = (
    *LLAMA_NAMES,
    ("e_score_correction_bias", "moe_statics.e_score_correction_bias"),
)


def _attention(
    fields: Fields,
    *,
    bias_field: str = "attention_bias",
    scaling: float | None = None,
    qk_norm: QKNorm | None = None,
    clip_qkv: float | None = None,
) -> GQA:
    """Attention with one flag for the biases of all four projections."""
    bias = fields.flag(bias_field)
    made = gqa(heads(fields), qkv_bias=bias, o_bias=bias, qk_norm=qk_norm, clip_qkv=clip_qkv)
    return made if scaling is None else replace(made, scaling=scaling)


def read_olmo(fields: Fields) -> Model:
    """OLMo: LayerNorms without parameters, queries, keys and values clipped by `clip_qkv`."""
    return gqa_decoder(
        fields,
        stem="Olmo",
        attention=_attention(fields, clip_qkv=fields.optional_number("clip_qkv")),
        windows=stray_windows(fields),
        feed_forward=gated(fields),
        norm=Norm(kind="layernorm", eps=1e-5, weight=False),
    )


def read_olmo2(fields: Fields) -> Model:
    """OLMo-2: norms after attention and feed-forward, and over all heads of q and of k."""
    return gqa_decoder(
        fields,
        stem="Olmo2",
        attention=_attention(fields, qk_norm=QKNorm(norm=rmsnorm(fields), width="full")),
        windows=stray_windows(fields),
        feed_forward=gated(fields),
        placement="post",
    )


def read_olmo3(fields: Fields) -> Model:
    """OLMo-3: olmo2 with three sliding layers to one full layer.

    A `rope_theta` outside `rope_parameters` and a `rope_scaling` reach the full layers alone.
    """
    norm = rmsnorm(fields)
    attention = _attention(fields, qk_norm=QKNorm(norm=norm, width="full"))
    window = fields.optional_size("sliding_window")
    windows = layer_windows(fields, window=window)
    if fields.raw("layer_types") is None:
        window = fields.size("sliding_window")
        windows = [window if (i + 1) % 4 else None for i in range(layer_count(fields))]
    everywhere, local = rope_by_kind(
        fields,
        head_dim=attention.head_dim,
        thetas={
            "full_attention": ("rope_theta", 500_000.0),
            "sliding_attention": (None, 500_000.0),
        },
    )
    return decoder(
        fields,
        stem="Olmo3",
        attentions=windowed(attention, windows),
        feed_forwards=[gated(fields)] * len(windows),
        norm=norm,
        positions=everywhere,
        local_positions=local,
        placement="post",
        mask_windows=None if window is None else (None, window),
    )


def read_olmoe(fields: Fields) -> Model:
    """OLMoE: mixtures of experts `intermediate_size` wide, norms over all heads of q and of k."""
    norm = rmsnorm(fields)
    attention = _attention(
        fields,
        qk_norm=QKNorm(norm=norm, width="full"),
        clip_qkv=fields.optional_number("clip_qkv"),
    )
    h = fields.size("hidden_size")
    if attention.num_attention_heads * attention.head_dim != h:
        raise ConfigError(
            f"head_dim={attention.head_dim} is not allowed: the query norm of olmoe has "
            f"hidden_size={h}"
        )
    return gqa_decoder(
        fields,
        stem="Olmoe",
        attention=attention,
        windows=stray_windows(fields),
        feed_forward=MoE(
            num_experts=fields.size("num_experts"),
            num_experts_per_tok=fields.size("num_experts_per_tok"),
            moe_intermediate_size=fields.size("intermediate_size"),
            activation=activation(fields),
            router="softmax",
            norm_topk_prob=fields.flag("norm_topk_prob"),
        ),
    )


def read_smollm3(fields: Fields) -> Model:
    """SmolLM3: every fourth layer has no positions; with `use_sliding_window` those slide."""
    L = layer_count(fields)
    rotary = fields.raw("no_rope_layers")
    if rotary is None:
        every = fields.size("no_rope_layer_interval")
        rotary = [int((i + 1) % every != 0) for i in range(L)]
    if not isinstance(rotary, list) or len(rotary) < L or any(r not in (0, 1) for r in rotary):
        raise ConfigError(f"no_rope_layers={shown(rotary)} is not allowed: {L} times 0 or 1")
    window = fields.optional_size("sliding_window")
    windows = layer_windows(fields, window=window)
    if fields.raw("layer_types") is None:
        on = fields.flag("use_sliding_window")
        windows = [window if on and not rotary[i] else None for i in range(L)]
    attention = _attention(fields)
    norm = rmsnorm(fields)
    made = {
        key: replace(attention, sliding_window=key[0], rope=key[1])
        for key in {(windows[i], bool(rotary[i])) for i in range(L)}
    }
    return decoder(
        fields,
        stem="SmolLM3",
        attentions=[made[windows[i], bool(rotary[i])] for i in range(L)],
        feed_forwards=[gated(fields, bias=fields.flag("mlp_bias"))] * L,
        norm=norm,
        positions=rope(fields, head_dim=attention.head_dim),
    )


def _granite(fields: Fields, *, stem: str, feed_forward: Dense | MoE, **extra: Any) -> Model:
    """Both granites: multipliers on embedding, scores and residuals, a divisor on the logits."""
    attention = _attention(fields, scaling=fields.number("attention_multiplier"))
    windows = stray_windows(fields)
    return decoder(
        fields,
        stem=stem,
        attentions=windowed(attention, windows),
        feed_forwards=[feed_forward] * len(windows),
        norm=rmsnorm(fields),
        positions=rope(fields, head_dim=attention.head_dim),
        residual_multiplier=fields.number("residual_multiplier"),
        embedding_scale=fields.number("embedding_multiplier"),
        logit_scale=1 / fields.number("logits_scaling"),
        **extra,
    )


def read_granite(fields: Fields) -> Model:
    """Granite: llama with multipliers; biases by flag."""
    feed_forward = gated(fields, bias=fields.flag("mlp_bias"))
    return _granite(fields, stem="Granite", feed_forward=feed_forward)


def read_granitemoe(fields: Fields) -> Model:
    """GraniteMoE: experts `intermediate_size` wide; softmax over the chosen logits alone."""
    mixture = MoE(
        num_experts=fields.size("num_local_experts"),
        num_experts_per_tok=fields.size("num_experts_per_tok"),
        moe_intermediate_size=fields.size("intermediate_size"),
        activation=activation(fields),
        router="softmax",
    )
    return _granite(fields, stem="GraniteMoe", feed_forward=mixture, names=GRANITEMOE_NAMES)


def read_seed_oss(fields: Fields) -> Model:
    """Seed-OSS: flags for the biases of q, k, v, of o_proj and of the feed-forward."""
    attention = replace(_attention(fields), o_bias=fields.flag("attention_out_bias"))
    return gqa_decoder(
        fields,
        stem="SeedOss",
        attention=attention,
        windows=stray_windows(fields),
        feed_forward=gated(fields, bias=fields.flag("mlp_bias")),
    )


def read_ernie4_5(fields: Fields) -> Model:
    """Ernie 4.5: one flag for all biases but the head's; interleaved rotary pairs."""
    attention = _attention(fields, bias_field="use_bias")
    return gqa_decoder(
        fields,
        stem="Ernie4_5",
        attention=attention,
        windows=stray_windows(fields),
        feed_forward=gated(fields, bias=fields.flag("use_bias")),
        positions=replace(rope(fields, head_dim=attention.head_dim), interleaved=True),
    )


def read_ernie4_5_moe(fields: Fields) -> Model:
    """Ernie 4.5 MoE: mixtures from a start to an end layer (−1: the last), every interval-th.

    Routed experts have no bias; the correction of the choice is a parameter. `use_bias` gives the
    head one too.
    """
    required_kv_heads(fields)
    attention = _attention(fields, bias_field="use_bias")
    bias, act, L = fields.flag("use_bias"), activation(fields), layer_count(fields)
    width = fields.size("moe_intermediate_size")
    shared = fields.size("moe_num_shared_experts", minimum=0)
    mixture = MoE(
        num_experts=fields.size("moe_num_experts"),
        num_experts_per_tok=fields.size("moe_k"),
        moe_intermediate_size=width,
        activation=act,
        router="softmax",
        correction_bias=True,
        shared=Dense(intermediate_size=width * shared, activation=act, gated=True, bias=bias)
        if shared
        else None,
    )
    dense = gated(fields, bias=bias)
    first = fields.size("moe_layer_start_index", minimum=0)
    end = check_size("moe_layer_end_index", fields.raw("moe_layer_end_index"), minimum=-1)
    last = L - 1 if end == -1 else end
    every = fields.size("moe_layer_interval")
    return decoder(
        fields,
        stem="Ernie4_5_Moe",
        attentions=windowed(attention, stray_windows(fields)),
        feed_forwards=[
            mixture if first <= i <= last and (i + 1) % every == 0 else dense for i in range(L)
        ],
        norm=rmsnorm(fields),
        positions=replace(rope(fields, head_dim=attention.head_dim), interleaved=True),
        names=ERNIE_MOE_NAMES,
        lm_head_bias=bias,
    )


READERS = {
    "ernie4_5": read_ernie4_5,
    "ernie4_5_moe": read_ernie4_5_moe,
    "granite": read_granite,
    "granitemoe": read_granitemoe,
    "olmo": read_olmo,
    "olmo2": read_olmo2,
    "olmo3": read_olmo3,
    "olmoe": read_olmoe,
    "seed_oss": read_seed_oss,
    "smollm3": read_smollm3,
}
