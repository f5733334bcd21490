"""Readers of GPTs with rotary positions: gpt_neox, gptj, phi, starcoder2, stablelm.

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`). Those
with learned positions are in gpt_learned.py, falcon, bloom and mpt in alibi_like.py.
"""

from __future__ import annotations

from planner.errors import ConfigError, shown
from planner.huggingface.blocks import (
    gated,
    gqa,
    gqa_decoder,
    heads,
    layer_windows,
    layernorm,
    plain,
    rope,
    stray_windows,
)
from planner.huggingface.fields import Fields
from planner.layers import GQA, Dense, Norm, QKNorm, RoPE
from planner.model import Model

NEOX_NAMES = (
    ("embed_tokens", "gpt_neox.embed_in"),
    ("layers", "gpt_neox.layers"),
    ("norm", "gpt_neox.final_layer_norm"),
    ("self_attn.qkv_proj", "attention.query_key_value"),
    ("self_attn.o_proj", "attention.dense"),
    ("mlp.up_proj", "mlp.dense_h_to_4h"),
    ("mlp.down_proj", "mlp.dense_4h_to_h"),
)
GPTJ_NAMES = (
    ("embed_tokens", "transformer.wte"),
    ("norm", "transformer.ln_f"),
    ("layers", "transformer.h"),
    ("input_layernorm", "ln_1"),
    ("self_attn.o_proj", "attn.out_proj"),
    ("self_attn", "attn"),
    ("mlp.up_proj", "mlp.fc_in"),
    ("mlp.down_proj", "mlp.fc_out"),
)
PHI_NAMES = (
    ("embed_tokens", "model.embed_tokens"),
    ("layers", "model.layers"),
    ("norm", "model.final_layernorm"),
    ("self_attn.q_norm", "self_attn.q_layernorm"),
    ("self_attn.k_norm", "self_attn.k_layernorm"),
    ("self_attn.o_proj", "self_attn.dense"),
    ("mlp.up_proj", "mlp.fc1"),
    ("mlp.down_proj", "mlp.fc2"),
)
STARCODER2_NAMES = (
    ("embed_tokens", "model.embed_tokens"),
    ("layers", "model.layers"),
    ("norm", "model.norm"),
    ("mlp.up_proj", "mlp.c_fc"),
    ("mlp.down_proj", "mlp.c_proj"),
)
STABLELM_NAMES = (
    ("embed_tokens", "model.embed_tokens"),
    ("layers", "model.layers"),
    ("norm", "model.norm"),
    ("self_attn.q_norm", "self_attn.q_layernorm"),
    ("self_attn.k_norm", "self_attn.k_layernorm"),
)


def head_width(fields: Fields) -> tuple[int, int]:
    """(heads, hidden_size / heads): these classes take no other `head_dim`."""
    h, H = fields.size("hidden_size"), fields.size("num_attention_heads")
    if h % H:
        raise ConfigError(f"hidden_size={h} is not a multiple of num_attention_heads={H}")
    if fields.raw("head_dim") not in (None, h // H):
        raise ConfigError(
            f"head_dim={shown(fields.raw('head_dim'))} is not allowed: hidden_size / "
            f"num_attention_heads = {h // H}"
        )
    return H, h // H


def read_gpt_neox(fields: Fields) -> Model:
    """GPT-NeoX: rotary on a quarter of the head, q, k and v of each head side by side.

    The rotary fields have names of their own: `rotary_pct`, `rotary_emb_base`.
    """
    fields.spell(rope_theta=("rotary_emb_base",), partial_rotary_factor=("rotary_pct",))
    fields.suppose(rotary_pct=0.25)
    H, D = head_width(fields)
    bias = fields.flag("attention_bias")
    return gqa_decoder(
        fields,
        stem="GPTNeoX",
        attention=GQA(
            num_attention_heads=H,
            num_key_value_heads=H,
            head_dim=D,
            scaling=D**-0.5,
            qkv_bias=bias,
            o_bias=bias,
            fused_qkv=True,
            interleaved_qkv=True,
        ),
        windows=stray_windows(fields),
        feed_forward=plain(fields),
        norm=layernorm(fields),
        placement="parallel-two" if fields.flag("use_parallel_residual") else "pre",
        positions=rope(fields, head_dim=D, partial=True),
        names=NEOX_NAMES,
    )


def read_gptj(fields: Fields) -> Model:
    """GPT-J: one norm for both parts, no attention biases, a bias on the head."""
    H, D = head_width(fields)
    rotary = fields.size("rotary_dim", minimum=2, maximum=D)
    if rotary % 2:
        raise ConfigError(f"rotary_dim={rotary} is not allowed: an even number")
    return gqa_decoder(
        fields,
        stem="GPTJ",
        attention=GQA(num_attention_heads=H, num_key_value_heads=H, head_dim=D, scaling=D**-0.5),
        windows=stray_windows(fields),
        feed_forward=plain_or_four_fold(fields, "n_inner"),
        norm=layernorm(fields, "layer_norm_epsilon"),
        placement="parallel",
        positions=RoPE(rope_theta=10_000.0, rotary_dim=rotary, interleaved=True),
        names=GPTJ_NAMES,
        lm_head_bias=True,
    )


def read_phi(fields: Fields) -> Model:
    """Phi-1, -2: one norm for both parts, biases everywhere, rotary on a part of the head."""
    fields.suppose(partial_rotary_factor=0.5)
    H, G, D = heads(fields)
    norm = layernorm(fields)
    normed = fields.flag("qk_layernorm")
    if normed and fields.size("hidden_size") // H != D:
        raise ConfigError(f"head_dim={D} is not allowed with qk_layernorm: hidden_size / heads")
    return gqa_decoder(
        fields,
        stem="Phi",
        attention=gqa(
            (H, G, D),
            qkv_bias=True,
            o_bias=True,
            qk_norm=QKNorm(norm=norm, width="head") if normed else None,
        ),
        windows=stray_windows(fields),
        feed_forward=plain(fields),
        norm=norm,
        placement="parallel",
        positions=rope(fields, head_dim=D, partial=True),
        names=PHI_NAMES,
        lm_head_bias=True,
    )


def read_starcoder2(fields: Fields) -> Model:
    """StarCoder2: grouped heads, LayerNorm, biases by flag, a window on every layer if any."""
    H, G, D = heads(fields)
    bias = fields.flag("use_bias")
    return gqa_decoder(
        fields,
        stem="Starcoder2",
        attention=gqa(
            (H, G, D),
            qkv_bias=bias,
            o_bias=bias,
        ),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=plain(fields, bias=bias),
        norm=layernorm(fields, "norm_epsilon"),
        names=STARCODER2_NAMES,
    )


def read_stablelm(fields: Fields) -> Model:
    """StableLM: LayerNorm, rotary on a quarter of the head, by flag a norm for each head of q, k.

    `use_parallel_residual`: one norm for both parts (stablelm-2-12b).
    """
    fields.suppose(partial_rotary_factor=0.25)
    H, D = head_width(fields)
    norm = layernorm(fields)
    per_head = Norm(kind="layernorm", eps=norm.eps)
    return gqa_decoder(
        fields,
        stem="StableLm",
        attention=GQA(
            num_attention_heads=H,
            num_key_value_heads=fields.size("num_key_value_heads"),
            head_dim=D,
            scaling=D**-0.5,
            qkv_bias=fields.flag("use_qkv_bias"),
            qk_norm=QKNorm(norm=per_head, width="head-list")
            if fields.flag("qk_layernorm")
            else None,
        ),
        windows=stray_windows(fields),
        feed_forward=gated(fields),
        norm=norm,
        placement="parallel" if fields.flag("use_parallel_residual") else "pre",
        positions=rope(fields, head_dim=D, partial=True),
        names=STABLELM_NAMES,
    )


def plain_or_four_fold(fields: Fields, size_field: str) -> Dense:
    """A feed-forward without a gate, 4 · hidden_size wide unless the field says otherwise."""
    return plain(
        fields,
        activation_field="activation_function",
        intermediate_size=fields.optional_size(size_field) or 4 * fields.size("hidden_size"),
    )


READERS = {
    "gpt_neox": read_gpt_neox,
    "gptj": read_gptj,
    "phi": read_phi,
    "stablelm": read_stablelm,
    "starcoder2": read_starcoder2,
}
