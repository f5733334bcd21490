"""Readers of qwen3, qwen3_moe, qwen2_moe, gemma and gemma3_text (transformers 5.23)."""

from __future__ import annotations

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
from planner.huggingface.mixed import (
    decoder,
    required_kv_heads,
    rope_by_kind,
    sparse_layers,
    windowed,
)
from planner.layers import GQA, Dense, MoE, QKNorm
from planner.model import Model

QWEN2_MOE_NAMES = (
    ("embed_tokens", "model.embed_tokens"),
    ("layers", "model.layers"),
    ("norm", "model.norm"),
    ("mlp.shared_experts", "mlp.shared_expert"),
)


def _window_if_on(fields: Fields) -> int | None:
    """`sliding_window` counts only with `use_sliding_window`."""
    return fields.optional_size("sliding_window") if fields.flag("use_sliding_window") else None


def _qwen3_attention(fields: Fields) -> GQA:
    H, G, D = heads(fields)
    bias = fields.flag("attention_bias")
    return gqa(
        (H, G, D),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=QKNorm(norm=rmsnorm(fields), width="head"),
    )


def read_qwen3(fields: Fields) -> Model:
    """Qwen3: a norm of head_dim on queries and keys; from `max_window_layers` on layers slide.

    They do so only with `use_sliding_window`. head_dim absent is 128, never hidden / heads.
    """
    fields.size("head_dim")
    window = _window_if_on(fields)
    windows = layer_windows(fields, window=window)
    if fields.raw("layer_types") is None and window is not None:
        first = fields.size("max_window_layers", minimum=0)
        windows = [window if i >= first else None for i in range(layer_count(fields))]
    return gqa_decoder(
        fields,
        stem="Qwen3",
        attention=_qwen3_attention(fields),
        windows=windows,
        feed_forward=gated(fields),
    )


def qwen_mixture(fields: Fields, *, shared: Dense | None = None) -> MoE | None:
    """None where `num_experts` is 0: all layers are dense then."""
    experts = fields.size("num_experts", minimum=0)
    if not experts:
        return None
    return MoE(
        num_experts=experts,
        num_experts_per_tok=fields.size("num_experts_per_tok"),
        moe_intermediate_size=fields.size("moe_intermediate_size"),
        activation=activation(fields),
        router="softmax",
        norm_topk_prob=fields.flag("norm_topk_prob"),
        shared=shared,
        shared_gate=shared is not None,
    )


def read_qwen3_moe(fields: Fields) -> Model:
    """Qwen3-MoE: qwen3's attention, mixtures but for `mlp_only_layers`; a window is everywhere."""
    required_kv_heads(fields)
    attention = _qwen3_attention(fields)
    return decoder(
        fields,
        stem="Qwen3Moe",
        attentions=windowed(attention, layer_windows(fields, window=_window_if_on(fields))),
        feed_forwards=sparse_layers(fields, dense=gated(fields), mixture=qwen_mixture(fields)),
        norm=rmsnorm(fields),
        positions=rope(fields, head_dim=attention.head_dim),
    )


def read_qwen2_moe(fields: Fields) -> Model:
    """Qwen2-MoE: a gated shared expert of its own width; q, k, v biases unless `qkv_bias` is off.

    With `use_sliding_window` every other layer before `max_window_layers` slides.
    """
    required_kv_heads(fields)
    H, G, D = heads(fields)
    window = _window_if_on(fields)
    windows = layer_windows(fields, window=window)
    if fields.raw("layer_types") is None and fields.flag("use_sliding_window"):
        window = fields.size("sliding_window")
        last = fields.size("max_window_layers", minimum=0)
        windows = [None if i % 2 or i >= last else window for i in range(layer_count(fields))]
    attention = gqa(
        (H, G, D),
        qkv_bias=fields.flag("qkv_bias"),
    )
    shared = gated(fields, size_field="shared_expert_intermediate_size")
    return decoder(
        fields,
        stem="Qwen2Moe",
        attentions=windowed(attention, windows),
        feed_forwards=sparse_layers(
            fields, dense=gated(fields), mixture=qwen_mixture(fields, shared=shared)
        ),
        norm=rmsnorm(fields),
        positions=rope(fields, head_dim=D),
        mask_windows=(None, window or 0),  # its config's window is 0 where it is off
        names=QWEN2_MOE_NAMES,
    )


def _causal_only(fields: Fields) -> None:
    if fields.flag("use_bidirectional_attention"):
        raise ConfigError("use_bidirectional_attention=True is not read yet: false")


def read_gemma(fields: Fields) -> Model:
    """Gemma: scaled embedding, 1 + weight norms, a head_dim of its own; "gelu" is its tanh form."""
    _causal_only(fields)
    required_kv_heads(fields)
    fields.size("head_dim")
    H, G, D = heads(fields)
    bias = fields.flag("attention_bias")
    act = activation(fields)
    return gqa_decoder(
        fields,
        stem="Gemma",
        attention=gqa(
            (H, G, D),
            qkv_bias=bias,
            o_bias=bias,
        ),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=Dense(
            intermediate_size=fields.size("intermediate_size"),
            activation="gelu_pytorch_tanh" if act == "gelu" else act,
            gated=True,
        ),
        norm=rmsnorm(fields, plus_one=True),
        embedding_scale=fields.size("hidden_size") ** 0.5,
    )


def read_gemma3_text(fields: Fields) -> Model:
    """Gemma-3: norms on both sides and on q and k; all but every sixth layer slide.

    Sliding layers have a rotary base of their own. transformers 5.23 stores
    `attn_logit_softcapping` and never applies it.
    """
    _causal_only(fields)
    required_kv_heads(fields)
    fields.size("head_dim")
    H, G, D = heads(fields, divisible_hidden=True)
    bias = fields.flag("attention_bias")
    window = fields.optional_size("sliding_window")
    windows = layer_windows(fields, window=window)
    if fields.raw("layer_types") is None:
        name = "sliding_window_pattern"
        every = fields.size(name) if fields.has(name) else 6
        windows = [window if (i + 1) % every else None for i in range(layer_count(fields))]
    norm = rmsnorm(fields, plus_one=True)
    attention = GQA(
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=D,
        scaling=fields.size("query_pre_attn_scalar") ** -0.5,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=QKNorm(norm=norm, width="head"),
    )
    everywhere, local = rope_by_kind(
        fields,
        head_dim=D,
        thetas={
            "full_attention": ("rope_theta", 1_000_000.0),
            "sliding_attention": ("rope_local_base_freq", 10_000.0),
        },
    )
    return decoder(
        fields,
        stem="Gemma3",
        base_class="Gemma3TextModel",
        attentions=windowed(attention, windows),
        feed_forwards=[gated(fields, activation_field="hidden_activation")] * len(windows),
        norm=norm,
        positions=everywhere,
        local_positions=local,
        placement="sandwich",
        mask_windows=None if window is None else (None, window),
        embedding_scale=fields.size("hidden_size") ** 0.5,
        final_logit_softcapping=fields.optional_number("final_logit_softcapping"),
    )


READERS = {
    "gemma": read_gemma,
    "gemma3_text": read_gemma3_text,
    "qwen2_moe": read_qwen2_moe,
    "qwen3": read_qwen3,
    "qwen3_moe": read_qwen3_moe,
}
