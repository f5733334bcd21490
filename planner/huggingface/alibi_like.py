"""Readers of families with linear biases (ALiBi): falcon by flag, bloom and mpt always.

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.errors import MAX_SIZE, ConfigError, shown
from planner.huggingface.blocks import gqa, gqa_decoder, layernorm, plain, rope, stray_windows
from planner.huggingface.fields import Fields, check_positive
from planner.huggingface.gpt_like import head_width
from planner.layers import GQA, ALiBi, Dense, Placement
from planner.model import Model

FALCON_NAMES = (
    ("embed_tokens", "transformer.word_embeddings"),
    ("embed_norm", "transformer.word_embeddings_layernorm"),
    ("norm", "transformer.ln_f"),
    ("layers", "transformer.h"),
    ("self_attn.qkv_proj", "self_attention.query_key_value"),
    ("self_attn.o_proj", "self_attention.dense"),
    ("mlp.up_proj", "mlp.dense_h_to_4h"),
    ("mlp.down_proj", "mlp.dense_4h_to_h"),
)
FALCON_TWO_NORMS = (("input_layernorm", "ln_attn"), ("post_attention_layernorm", "ln_mlp"))
MPT_NAMES = (
    ("embed_tokens", "transformer.wte"),
    ("norm", "transformer.norm_f"),
    ("layers", "transformer.blocks"),
    ("input_layernorm", "norm_1"),
    ("post_attention_layernorm", "norm_2"),
    ("self_attn.qkv_proj", "attn.Wqkv"),
    ("self_attn.o_proj", "attn.out_proj"),
    ("mlp", "ffn"),
)


def read_falcon(fields: Fields) -> Model:
    """Falcon: one kv head (7b) or, with the new decoder, `num_kv_heads` groups (40b).

    The new decoder's keys and values are cached expanded to all heads.
    """
    _spell_hidden_size(fields)
    H, D = head_width(fields)
    new, bias = fields.flag("new_decoder_architecture"), fields.flag("bias")
    G = _falcon_kv_heads(fields, H, new=new)
    placement = _falcon_placement(fields, new=new)
    return gqa_decoder(
        fields,
        stem="Falcon",
        attention=gqa(
            (H, G, D),
            qkv_bias=bias,
            o_bias=bias,
            fused_qkv=True,
            interleaved_qkv=G > 1,
            cache_heads=H if new and G != H else None,
        ),
        windows=stray_windows(fields),
        feed_forward=plain(
            fields,
            activation_field="activation",
            intermediate_size=fields.optional_size("ffn_hidden_size")
            or 4 * fields.size("hidden_size"),
            bias=bias,
        ),
        norm=layernorm(fields, "layer_norm_epsilon"),
        placement=placement,
        positions=ALiBi(scaled=True) if fields.flag("alibi") else rope(fields, head_dim=D),
        names=(*FALCON_NAMES, *(FALCON_TWO_NORMS if placement == "parallel-two" else ())),
    )


def _falcon_kv_heads(fields: Fields, H: int, *, new: bool) -> int:
    G = fields.optional_size("num_kv_heads") or H
    if new:
        return G
    if fields.flag("multi_query"):
        return 1
    if G != H:
        raise ConfigError(
            f"num_kv_heads={G} is not allowed without multi_query and new_decoder_architecture: "
            f"num_attention_heads={H}"
        )
    return H


def _falcon_placement(fields: Fields, *, new: bool) -> Placement:
    parallel, norms = fields.flag("parallel_attn"), fields.raw("num_ln_in_parallel_attn")
    if norms not in (None, 1, 2) or isinstance(norms, bool):
        raise ConfigError(f"num_ln_in_parallel_attn={shown(norms)} is not allowed: 1, 2 or null")
    if new and not parallel:
        raise ConfigError(
            "parallel_attn=False is not allowed with new_decoder_architecture: true (its class "
            "fails in the first pass)"
        )
    if not parallel:
        return "pre"
    if not new and norms == 2:
        raise ConfigError(
            "num_ln_in_parallel_attn=2 is not allowed without new_decoder_architecture: 1 or null"
        )
    return "parallel-two" if new and norms != 1 else "parallel"


def read_bloom(fields: Fields) -> Model:
    """BLOOM: biases everywhere, a norm behind the embedding; no table ends its positions."""
    _spell_hidden_size(fields)
    H, D = head_width(fields)
    h, norm = fields.size("hidden_size"), layernorm(fields, "layer_norm_epsilon")
    if fields.flag("apply_residual_connection_post_layernorm"):
        raise ConfigError("apply_residual_connection_post_layernorm=True is not read yet: false")
    return gqa_decoder(
        fields,
        stem="Bloom",
        attention=GQA(
            num_attention_heads=H,
            num_key_value_heads=H,
            head_dim=D,
            scaling=D**-0.5,
            qkv_bias=True,
            o_bias=True,
            fused_qkv=True,
            interleaved_qkv=True,
        ),
        windows=stray_windows(fields),
        feed_forward=Dense(intermediate_size=4 * h, activation="gelu_new", gated=False, bias=True),
        norm=norm,
        embedding_norm=norm,
        positions=ALiBi(),
        max_position_embeddings=MAX_SIZE,
        names=FALCON_NAMES,
    )


def read_mpt(fields: Fields) -> Model:
    """MPT: no biases, LayerNorm with weights alone; `max_seq_len` ends its table of biases.

    The class takes no notice of `expansion_ratio`, `no_bias` and `learned_pos_emb`.
    """
    fields.spell(max_position_embeddings=("max_seq_len",))
    H, D = head_width(fields)
    attention = _mpt_attention(fields)
    scale, clip = attention.get("softmax_scale"), attention.get("clip_qkv")
    caps = fields.config.get("architectures") == ["MPTForCausalLM"]  # as in MosaicML's own configs
    return gqa_decoder(
        fields,
        stem="MPT" if caps else "Mpt",
        attention=GQA(
            num_attention_heads=H,
            num_key_value_heads=H,
            head_dim=D,
            scaling=D**-0.5 if scale is None else check_positive("softmax_scale", scale),
            fused_qkv=True,
            clip_qkv=check_positive("clip_qkv", clip) if clip else None,
        ),
        windows=stray_windows(fields),
        feed_forward=Dense(
            intermediate_size=4 * fields.size("hidden_size"), activation="gelu", gated=False
        ),
        norm=layernorm(fields, "layer_norm_epsilon", bias=False),
        positions=ALiBi(),
        names=MPT_NAMES,
    )


def _mpt_attention(fields: Fields) -> Mapping[str, Any]:
    """`attn_config`; what its class passes over though the weights need it is refused."""
    attention = fields.raw("attn_config") or {}
    if not isinstance(attention, Mapping):
        raise ConfigError(f"attn_config={shown(attention)} is not allowed: an object or null")
    for name, allowed in (
        ("attn_type", "multihead_attention"),
        ("alibi", True),
        ("qk_ln", False),
        ("prefix_lm", False),
    ):
        if attention.get(name, allowed) != allowed:
            raise ConfigError(f"attn_config.{name}={shown(attention[name])} is not read: {allowed}")
    return attention


def _spell_hidden_size(fields: Fields) -> None:
    """`n_embed` goes before `hidden_size` where the config has it."""
    if fields.config.get("n_embed") is not None:
        fields.spell(hidden_size=("n_embed",))


READERS = {
    "bloom": read_bloom,
    "falcon": read_falcon,
    "mpt": read_mpt,
}
