"""Readers of the llama family: llama, mistral, qwen2, phi3, gemma2, mixtral.

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`).
"""

from __future__ import annotations

from dataclasses import replace

from planner.errors import ConfigError
from planner.huggingface.blocks import (
    activation,
    gated,
    gqa,
    gqa_decoder,
    heads,
    layer_count,
    layer_windows,
    rmsnorm,
    rope,
)
from planner.huggingface.fields import Fields
from planner.layers import GQA, MoE
from planner.model import Model


def read_llama(fields: Fields) -> Model:
    """Llama: biases by flag; a stray `sliding_window` does clip the cache."""
    H, G, D = heads(fields, divisible_hidden=True)
    bias = fields.flag("attention_bias")
    return gqa_decoder(
        fields,
        stem="Llama",
        attention=gqa(
            (H, G, D),
            qkv_bias=bias,
            o_bias=bias,
        ),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=gated(fields, bias=fields.flag("mlp_bias")),
    )


def read_mistral(fields: Fields) -> Model:
    """Mistral: a window on every layer unless null (absent: 4 096); any head_dim."""
    H, G, D = heads(fields)
    return gqa_decoder(
        fields,
        stem="Mistral",
        attention=gqa((H, G, D)),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=gated(fields),
    )


def read_qwen2(fields: Fields) -> Model:
    """Qwen2: q, k and v have a bias; the window counts only with `use_sliding_window`.

    When it is on, layers from `max_window_layers` on slide.
    """
    H, G, D = heads(fields)
    on = fields.flag("use_sliding_window")
    window = fields.optional_size("sliding_window") if on else None
    windows = layer_windows(fields, window=window)
    if fields.raw("layer_types") is None:
        first = fields.size("max_window_layers", minimum=0) if on else 0
        windows = [w if i >= first else None for i, w in enumerate(windows)]
    return gqa_decoder(
        fields,
        stem="Qwen2",
        attention=gqa(
            (H, G, D),
            qkv_bias=True,
        ),
        windows=windows,
        feed_forward=gated(fields),
    )


def read_phi3(fields: Fields) -> Model:
    """Phi-3: one matrix for q, k, v and one for gate and up; a window unless null or absent.

    Its class takes "su" and "yarn" for older names of longrope.
    """
    H, G, D = heads(fields)
    names = ("default", "longrope", "su", "yarn")
    positions = rope(fields, head_dim=D, rope_types=names, partial=True)
    if positions.rope_type in ("su", "yarn"):
        positions = replace(positions, rope_type="longrope")
    return gqa_decoder(
        fields,
        stem="Phi3",
        attention=gqa(
            (H, G, D),
            fused_qkv=True,
        ),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=gated(fields, fused=True),
        positions=positions,
    )


def read_gemma2(fields: Fields) -> Model:
    """Gemma-2: norms on both sides, scaled embedding, soft caps, every other layer slides."""
    H, G, D = heads(fields, divisible_hidden=True)
    if fields.flag("use_bidirectional_attention"):
        raise ConfigError("use_bidirectional_attention=True is not read yet: false")
    bias = fields.flag("attention_bias")
    window = fields.optional_size("sliding_window")
    windows = layer_windows(fields, window=window)
    if fields.raw("layer_types") is None:
        windows = [None if i % 2 else window for i in range(layer_count(fields))]
    return gqa_decoder(
        fields,
        stem="Gemma2",
        attention=GQA(
            num_attention_heads=H,
            num_key_value_heads=G,
            head_dim=D,
            scaling=fields.size("query_pre_attn_scalar") ** -0.5,
            logit_softcap=fields.optional_number("attn_logit_softcapping"),
            qkv_bias=bias,
            o_bias=bias,
        ),
        windows=windows,
        feed_forward=gated(fields, activation_field="hidden_activation"),
        norm=rmsnorm(fields, plus_one=True),
        placement="sandwich",
        mask_windows=tuple({None, window}),
        embedding_scale=fields.size("hidden_size") ** 0.5,
        final_logit_softcapping=fields.optional_number("final_logit_softcapping"),
    )


def read_mixtral(fields: Fields) -> Model:
    """Mixtral: every layer a mixture, experts `intermediate_size` wide, no window by default."""
    H, G, D = heads(fields)
    return gqa_decoder(
        fields,
        stem="Mixtral",
        attention=gqa((H, G, D)),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=MoE(
            num_experts=fields.size("num_local_experts"),
            num_experts_per_tok=fields.size("num_experts_per_tok"),
            moe_intermediate_size=fields.size("intermediate_size"),
            activation=activation(fields),
            router="softmax",
        ),
    )


READERS = {
    "gemma2": read_gemma2,
    "llama": read_llama,
    "mistral": read_mistral,
    "mixtral": read_mixtral,
    "phi3": read_phi3,
    "qwen2": read_qwen2,
}
