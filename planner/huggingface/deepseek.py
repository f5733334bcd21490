"""Readers of deepseek_v2 and deepseek_v3 (transformers 5.23, models/<type>/)."""

from __future__ import annotations

import math
from dataclasses import replace

from planner.errors import ConfigError
from planner.huggingface.blocks import (
    SCALED_ROPE,
    activation,
    causal_lm,
    gated,
    layer_count,
    rmsnorm,
    rope,
)
from planner.huggingface.fields import Fields
from planner.layers import MLA, Dense, Layer, MoE, RoPE
from planner.model import Model


def latent_attention(fields: Fields, positions: RoPE | None) -> MLA:
    """Multi-head latent attention; `positions` may scale the scores (YaRN)."""
    D_nope, D_rope = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")
    return MLA(
        num_attention_heads=fields.size("num_attention_heads"),
        q_lora_rank=fields.optional_size("q_lora_rank"),
        kv_lora_rank=fields.size("kv_lora_rank"),
        qk_nope_head_dim=D_nope,
        qk_rope_head_dim=D_rope,
        v_head_dim=fields.size("v_head_dim"),
        scaling=(D_nope + D_rope) ** -0.5 * (yarn_scale(positions) if positions else 1.0),
        bias=fields.flag("attention_bias"),
    )


def sigmoid_group_mixture(fields: Fields, *, experts: str = "n_routed_experts") -> MoE:
    """DeepSeek-V3's mixture, which others share: sigmoid scores, groups, a shared expert.

    Field `experts` counts the routed ones. A group is judged by its two best.
    """
    E, groups = fields.size(experts), fields.size("n_group")
    if groups == E:
        raise ConfigError(
            f"n_group={groups} is not allowed: groups of two or more of {experts}={E}"
        )
    act, width = activation(fields), fields.size("moe_intermediate_size")
    return MoE(
        num_experts=E,
        num_experts_per_tok=fields.size("num_experts_per_tok"),
        moe_intermediate_size=width,
        activation=act,
        router="sigmoid-groups",
        shared=Dense(
            intermediate_size=width * fields.size("n_shared_experts"), activation=act, gated=True
        ),
        n_group=groups,
        topk_group=fields.size("topk_group"),
        norm_topk_prob=fields.flag("norm_topk_prob"),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
    )


def read_deepseek_v2(fields: Fields) -> Model:
    """DeepSeek-V2: latent attention, softmax router without renormalisation, shared experts.

    `norm_topk_prob` is not read by its class; groups count only with `group_limited_greedy`.
    """
    H, h = fields.size("num_attention_heads"), fields.size("hidden_size")
    if h % H:
        raise ConfigError(f"hidden_size={h} is not a multiple of num_attention_heads={H}")
    G = fields.optional_size("num_key_value_heads")
    if G not in (None, H):
        raise ConfigError(f"num_key_value_heads={G} is not allowed: num_attention_heads={H}")
    positions = rope(fields, head_dim=fields.size("qk_rope_head_dim"), interleaved=True)
    attention = latent_attention(fields, positions)
    act, width = activation(fields), fields.size("moe_intermediate_size")
    bias = fields.flag("mlp_bias")
    method = fields.choice("topk_method", ("greedy", "group_limited_greedy"))
    grouped = method == "group_limited_greedy"
    moe = MoE(
        num_experts=fields.size("n_routed_experts"),
        num_experts_per_tok=fields.size("num_experts_per_tok"),
        moe_intermediate_size=width,
        activation=act,
        router="softmax",
        shared=Dense(
            intermediate_size=width * fields.size("n_shared_experts"),
            activation=act,
            gated=True,
            bias=bias,
        ),
        n_group=fields.size("n_group") if grouped else 1,
        topk_group=fields.size("topk_group") if grouped else 1,
        group_best=1 if grouped else 2,
        norm_topk_prob=False,
        routed_scaling_factor=fields.number("routed_scaling_factor"),
    )
    norm, first = rmsnorm(fields), fields.size("first_k_dense_replace", minimum=0)
    dense = gated(fields, bias=bias)
    blocks = [Layer(attention=attention, feed_forward=f, norm=norm) for f in (dense, moe)]
    return causal_lm(
        fields,
        layers=tuple(blocks[i >= first] for i in range(layer_count(fields))),
        final_norm=norm,
        positions=positions,
        base_class="DeepseekV2Model",
        head_class="DeepseekV2ForCausalLM",
    )


def read_deepseek_v3(fields: Fields) -> Model:
    """DeepSeek-V3: latent attention, the first layers dense, then routed plus shared experts.

    The multi-token-prediction layer is in the checkpoint, not in transformers' module; the router's
    correction bias is a buffer there.
    """
    positions = rope(fields, head_dim=fields.size("qk_rope_head_dim"), rope_types=SCALED_ROPE)
    attention = replace(
        latent_attention(fields, positions), rope_interleave=fields.flag("rope_interleave")
    )
    dense, moe = gated(fields), sigmoid_group_mixture(fields)
    norm = rmsnorm(fields)
    first = fields.size("first_k_dense_replace", minimum=0)
    blocks = [Layer(attention=attention, feed_forward=f, norm=norm) for f in (dense, moe)]
    return causal_lm(
        fields,
        layers=tuple(blocks[i >= first] for i in range(layer_count(fields))),
        final_norm=norm,
        positions=positions,
        base_class="DeepseekV3Model",
        head_class="DeepseekV3ForCausalLM",
    )


def read_kimi_k2(fields: Fields) -> Model:
    """Kimi K2 (arXiv:2507.20534) is a DeepSeek-V3; no type of transformers has its name."""
    return replace(read_deepseek_v3(fields), text_type="deepseek_v3")


def yarn_scale(positions: RoPE) -> float:
    """YaRN's factor on the scores: (0.1 · mscale_all_dim · ln s + 1)², 1 without scaling.

    transformers 5.23, models/deepseek_v3/modeling_deepseek_v3.py: yarn_apply_mscale.
    """
    scaling = dict(positions.scaling)
    mscale, factor = scaling.get("mscale_all_dim"), scaling.get("factor")
    if positions.rope_type == "default" or not isinstance(mscale, int | float) or not mscale:
        return 1.0
    if not isinstance(factor, int | float) or factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2


READERS = {
    "deepseek_v2": read_deepseek_v2,
    "deepseek_v3": read_deepseek_v3,
    "kimi_k2": read_kimi_k2,
}
