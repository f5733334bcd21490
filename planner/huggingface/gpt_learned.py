"""Readers of GPTs with a table of learned positions: opt, gpt_bigcode, gpt_neo (gpt2: gpt2.py).

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`).
"""

from __future__ import annotations

from planner.errors import ConfigError, shown
from planner.huggingface.blocks import (
    causal_lm,
    gqa_decoder,
    layer_count,
    layernorm,
    plain,
    stray_windows,
    with_windows,
)
from planner.huggingface.fields import Fields
from planner.huggingface.gpt2 import GPT2_NAMES
from planner.huggingface.gpt_like import head_width, plain_or_four_fold
from planner.layers import GQA, Layer, LearnedPositions, Norm
from planner.model import Model

OPT_NAMES = (
    ("embed_tokens", "model.decoder.embed_tokens"),
    ("embed_positions", "model.decoder.embed_positions"),
    ("project_in", "model.decoder.project_in"),
    ("project_out", "model.decoder.project_out"),
    ("norm", "model.decoder.final_layer_norm"),
    ("layers", "model.decoder.layers"),
    ("self_attn.o_proj", "self_attn.out_proj"),
    ("mlp.up_proj", "fc1"),
    ("mlp.down_proj", "fc2"),
)
GPT_NEO_NAMES = (
    ("embed_tokens", "transformer.wte"),
    ("embed_positions", "transformer.wpe"),
    ("norm", "transformer.ln_f"),
    ("layers", "transformer.h"),
    ("input_layernorm", "ln_1"),
    ("post_attention_layernorm", "ln_2"),
    ("self_attn.o_proj", "attn.attention.out_proj"),
    ("self_attn", "attn.attention"),
    ("mlp.up_proj", "mlp.c_fc"),
    ("mlp.down_proj", "mlp.c_proj"),
)


def read_opt(fields: Fields) -> Model:
    """OPT: two rows more in the table of positions, biases and norm weights by flag.

    opt-350m norms after each sum, has no last norm and embeds in `word_embed_proj_dim`.
    """
    H, D = head_width(fields)
    h, bias = fields.size("hidden_size"), fields.flag("enable_bias")
    affine = fields.flag("layer_norm_elementwise_affine")
    norm = Norm(kind="layernorm", eps=1e-5, weight=affine, bias=affine)
    before = fields.flag("do_layer_norm_before")
    attention = GQA(
        num_attention_heads=H,
        num_key_value_heads=H,
        head_dim=D,
        scaling=D**-0.5,
        qkv_bias=bias,
        o_bias=bias,
    )
    layer = Layer(
        attention=attention,
        feed_forward=plain(
            fields,
            activation_field="activation_function",
            intermediate_size=fields.size("ffn_dim"),
            bias=bias,
        ),
        norm=norm,
        placement="pre" if before else "post-sum",
    )
    first, second = (
        ("input", "post_attention") if before else ("post_attention", "post_feedforward")
    )
    width = fields.optional_size("word_embed_proj_dim") or h
    return causal_lm(
        fields,
        layers=with_windows(layer, attention, stray_windows(fields)),
        final_norm=norm if before and not fields.flag("_remove_final_layer_norm") else None,
        positions=LearnedPositions(offset=2),
        names=(
            *OPT_NAMES,
            (f"{first}_layernorm", "self_attn_layer_norm"),
            (f"{second}_layernorm", "final_layer_norm"),
        ),
        base_class="OPTModel",
        head_class="OPTForCausalLM",
        embedding_size=width if width != h else None,
    )


def read_gpt_bigcode(fields: Fields) -> Model:
    """StarCoder: GPT-2 with one kv head unless `multi_query` is off, and plain linears."""
    H, D = head_width(fields)
    if fields.flag("add_cross_attention"):
        raise ConfigError("add_cross_attention=True is not read yet: false")
    multi_query = fields.flag("multi_query")
    return gqa_decoder(
        fields,
        stem="GPTBigCode",
        attention=GQA(
            num_attention_heads=H,
            num_key_value_heads=1 if multi_query else H,
            head_dim=D,
            scaling=D**-0.5 if fields.flag("scale_attn_weights") else 1.0,
            qkv_bias=True,
            o_bias=True,
            fused_qkv=True,
            interleaved_qkv=not multi_query,
        ),
        windows=stray_windows(fields),
        feed_forward=plain_or_four_fold(fields, "n_inner"),
        norm=layernorm(fields, "layer_norm_epsilon"),
        positions=LearnedPositions(),
        names=GPT2_NAMES,
    )


def read_gpt_neo(fields: Fields) -> Model:
    """GPT-Neo: scores are not scaled; "local" layers mask, but neither compute nor cache less."""
    H, D = head_width(fields)
    norm = layernorm(fields, "layer_norm_epsilon")
    feed_forward = plain_or_four_fold(fields, "intermediate_size")
    layers = tuple(
        Layer(
            attention=GQA(
                num_attention_heads=H,
                num_key_value_heads=H,
                head_dim=D,
                scaling=1.0,
                o_bias=True,
                sliding_window=stray,
                masked_window=fields.size("window_size") if kind == "local" else None,
            ),
            feed_forward=feed_forward,
            norm=norm,
        )
        for kind, stray in zip(_attention_kinds(fields), stray_windows(fields), strict=True)
    )
    return causal_lm(
        fields,
        layers=layers,
        final_norm=norm,
        positions=LearnedPositions(),
        names=GPT_NEO_NAMES,
        base_class="GPTNeoModel",
        head_class="GPTNeoForCausalLM",
    )


def _attention_kinds(fields: Fields) -> list[str]:
    """ "global" or "local" for every layer, from `attention_types` [[["global", "local"], 12]]."""
    types, L = fields.raw("attention_types"), layer_count(fields)
    if types is None:
        types = [[["global", "local"], 12]]
    refusal = ConfigError(
        f"attention_types={shown(types)} is not allowed: global or local for each of {L} layers, "
        "as [[[words], times]]"
    )
    kinds: list[str] = []
    try:
        for words, times in types:
            if len(words) * times > L:
                raise refusal
            kinds += list(words) * times
    except (TypeError, ValueError):
        raise refusal from None
    if len(kinds) != L or any(kind not in ("global", "local") for kind in kinds):
        raise refusal
    return kinds


READERS = {
    "gpt_bigcode": read_gpt_bigcode,
    "gpt_neo": read_gpt_neo,
    "opt": read_opt,
}
