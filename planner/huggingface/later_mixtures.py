"""Readers of gpt_oss, glm4_moe, phimoe, minimax_m2 and hunyuan_v1_moe.

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`).
"""

from __future__ import annotations

from dataclasses import replace

from planner.errors import ConfigError, check_size, shown
from planner.huggingface.blocks import (
    LLAMA_NAMES,
    activation,
    causal_lm,
    gated,
    gqa,
    gqa_decoder,
    layer_count,
    layer_windows,
    layernorm,
    rmsnorm,
    rope,
)
from planner.huggingface.deepseek import sigmoid_group_mixture
from planner.huggingface.fields import Fields, check_positive
from planner.huggingface.later_decoders import (
    HUNYUAN_NAMES,
    hunyuan_attention,
    local_layers,
    stated_heads,
)
from planner.layers import Layer, MoE, QKNorm
from planner.model import Model

MINIMAX_M2_NAMES = (
    *LLAMA_NAMES,
    ("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),
)
ROUTER_NAMES = (*LLAMA_NAMES, ("mlp.gate", "mlp.router"))
HUNYUAN_MOE_NAMES = (
    *HUNYUAN_NAMES,
    ("mlp.gate", "mlp.gate.wg"),
    ("mlp.shared_experts", "mlp.shared_mlp"),
)
GPT_OSS_YARN = (
    ("beta_fast", 32.0),
    ("beta_slow", 1.0),
    ("factor", 32.0),
    ("original_max_position_embeddings", 4096),
    ("truncate", False),
)


def read_gpt_oss(fields: Fields) -> Model:
    """gpt-oss: sinks, biases on router and experts, every other layer slides, YaRN by default."""
    H, G, D = stated_heads(fields)
    bias, window = fields.flag("attention_bias"), fields.size("sliding_window")
    positions = rope(fields, head_dim=D)
    if not fields.raw("rope_scaling") and fields.raw("rope_parameters") is None:
        positions = replace(positions, rope_type="yarn", scaling=GPT_OSS_YARN)
    return gqa_decoder(
        fields,
        stem="GptOss",
        attention=gqa(
            (H, G, D),
            qkv_bias=bias,
            o_bias=bias,
            sinks=True,
        ),
        windows=[window if s else None for s in local_layers(fields, lambda i: i % 2 == 0)],
        feed_forward=MoE(
            num_experts=fields.size("num_local_experts"),
            num_experts_per_tok=fields.size("num_experts_per_tok"),
            moe_intermediate_size=fields.size("intermediate_size"),
            activation=activation(fields),
            router="softmax",
            bias=True,
            layout="transposed",
            swiglu_alpha=fields.number("swiglu_alpha"),
            swiglu_limit=fields.number("swiglu_limit"),
        ),
        positions=positions,
        names=ROUTER_NAMES,
        mask_windows=(None, window),
    )


def read_glm4_moe(fields: Fields) -> Model:
    """GLM-4.5: GQA, half of a head turns; the first layers dense, then DeepSeek-V3's mixture.

    The multi-token-prediction layer is in the checkpoint, not in transformers' module.
    """
    H, G, D = stated_heads(fields, head_dim=False)
    norm = rmsnorm(fields)
    attention = gqa(
        (H, G, D),
        qkv_bias=fields.flag("attention_bias"),
        qk_norm=QKNorm(norm=norm, width="head") if fields.flag("use_qk_norm") else None,
    )
    moe = sigmoid_group_mixture(fields)
    first = fields.size("first_k_dense_replace", minimum=0)
    windows = layer_windows(fields, window=fields.optional_size("sliding_window"))
    made = {
        (dense, w): Layer(
            attention=replace(attention, sliding_window=w),
            feed_forward=gated(fields) if dense else moe,
            norm=norm,
        )
        for dense in (True, False)
        for w in windows
    }
    return causal_lm(
        fields,
        layers=tuple(made[i < first, w] for i, w in enumerate(windows)),
        final_norm=norm,
        positions=rope(fields, head_dim=D, partial=True, partial_default=0.5),
        base_class="Glm4MoeModel",
        head_class="Glm4MoeForCausalLM",
    )


def read_phimoe(fields: Fields) -> Model:
    """Phi-3.5-MoE: LayerNorm with bias, a head bias by flag, two experts by SparseMixer."""
    H, G, D = stated_heads(fields, head_dim=False)
    bias = fields.flag("attention_bias")
    if fields.size("num_experts_per_tok") != 2:
        raise ConfigError(
            f"num_experts_per_tok={fields.size('num_experts_per_tok')} is not allowed: "
            "2, which is what SparseMixer picks"
        )
    noise = fields.raw("router_jitter_noise")
    positions = rope(fields, head_dim=D)
    if positions.rope_type != "default":
        scaling = dict(positions.scaling)
        for name in ("short_mscale", "long_mscale"):
            check_positive(name, scaling.get(name))
    return gqa_decoder(
        fields,
        stem="Phimoe",
        attention=gqa(
            (H, G, D),
            qkv_bias=bias,
            o_bias=bias,
        ),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=MoE(
            num_experts=fields.size("num_local_experts"),
            num_experts_per_tok=2,
            linear_router=True,
            moe_intermediate_size=fields.size("intermediate_size"),
            activation=activation(fields),
            router="sparsemixer",
            router_jitter_noise=check_positive("router_jitter_noise", noise) if noise else 0.0,
            norm_topk_prob=False,
        ),
        norm=layernorm(fields, "rms_norm_eps"),
        positions=positions,
        names=ROUTER_NAMES,
        lm_head_bias=fields.flag("lm_head_bias"),
    )


def read_minimax_m2(fields: Fields) -> Model:
    """MiniMax-M2: q and k normed over all heads, sigmoid router with a correction, none shared.

    Released configs say `rotary_dim` where newer ones say `partial_rotary_factor`.
    """
    H, G, D = stated_heads(fields)
    rotary_dim = fields.optional_size("rotary_dim")
    norm = rmsnorm(fields)
    return gqa_decoder(
        fields,
        stem="MiniMaxM2",
        attention=gqa(
            (H, G, D),
            qk_norm=QKNorm(norm=norm, width="full"),
        ),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=MoE(
            num_experts=fields.size("num_local_experts"),
            num_experts_per_tok=fields.size("num_experts_per_tok"),
            moe_intermediate_size=fields.size("intermediate_size"),
            activation=activation(fields),
            router="sigmoid-groups",
        ),
        norm=norm,
        names=MINIMAX_M2_NAMES,
        positions=rope(
            fields,
            head_dim=D,
            partial=True,
            partial_default=1.0 if rotary_dim is None else rotary_dim / D,
        ),
    )


def read_hunyuan_v1_moe(fields: Fields) -> Model:
    """Hunyuan-A13B: a shared expert as wide as the routed ones; `moe_topk` may differ by layer."""
    attention, norm, dense = hunyuan_attention(fields), rmsnorm(fields), gated(fields)
    L, topk = layer_count(fields), fields.raw("moe_topk")
    if isinstance(topk, list) and len(topk) != L:
        raise ConfigError(f"moe_topk={shown(topk)} is not allowed: a number or a list of {L}")
    each = [check_size("moe_topk", k) for k in (topk if isinstance(topk, list) else [topk] * L)]
    windows = layer_windows(fields, window=fields.optional_size("sliding_window"))

    def layer(k: int, window: int | None) -> Layer:
        moe = MoE(
            num_experts=fields.size("num_experts"),
            num_experts_per_tok=k,
            linear_router=True,
            moe_intermediate_size=dense.intermediate_size,
            activation=dense.activation,
            router="softmax",
            shared=dense,
        )
        windowed = replace(attention, sliding_window=window)
        return Layer(attention=windowed, feed_forward=moe, norm=norm)

    kinds = list(zip(each, windows, strict=True))
    made = {kind: layer(*kind) for kind in set(kinds)}
    return causal_lm(
        fields,
        layers=tuple(made[kind] for kind in kinds),
        final_norm=norm,
        positions=rope(fields, head_dim=attention.head_dim),
        names=HUNYUAN_MOE_NAMES,
        base_class="HunYuanMoEV1Model",
        head_class="HunYuanMoEV1ForCausalLM",
    )


READERS = {
    "glm4_moe": read_glm4_moe,
    "gpt_oss": read_gpt_oss,
    "hunyuan_v1_moe": read_hunyuan_v1_moe,
    "minimax_m2": read_minimax_m2,
    "phimoe": read_phimoe,
}
