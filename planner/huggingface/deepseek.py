"""Reader of deepseek_v3 (transformers 5.23, models/deepseek_v3/)."""

from __future__ import annotations

import math

from planner.huggingface.blocks import (
    SCALED_ROPE,
    activation,
    causal_lm,
    layer_count,
    rmsnorm,
    rope,
)
from planner.huggingface.fields import Fields
from planner.layers import MLA, Dense, Layer, MoE, RoPE
from planner.model import Model


def read_deepseek_v3(fields: Fields) -> Model:
    """DeepSeek-V3: latent attention, the first layers dense, then routed plus shared experts.

    The multi-token-prediction layer is in the checkpoint, not in transformers' module; the router's
    correction bias is a buffer there.
    """
    positions = rope(fields, head_dim=fields.size("qk_rope_head_dim"), rope_types=SCALED_ROPE)
    D_nope, D_rope = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")
    attention = MLA(
        num_attention_heads=fields.size("num_attention_heads"),
        q_lora_rank=fields.optional_size("q_lora_rank"),
        kv_lora_rank=fields.size("kv_lora_rank"),
        qk_nope_head_dim=D_nope,
        qk_rope_head_dim=D_rope,
        v_head_dim=fields.size("v_head_dim"),
        scaling=(D_nope + D_rope) ** -0.5 * _yarn_scale(positions),
        bias=fields.flag("attention_bias"),
        rope_interleave=fields.flag("rope_interleave"),
    )
    act = activation(fields)
    width = fields.size("moe_intermediate_size")
    dense = Dense(intermediate_size=fields.size("intermediate_size"), activation=act, gated=True)
    moe = MoE(
        num_experts=fields.size("n_routed_experts"),
        num_experts_per_tok=fields.size("num_experts_per_tok"),
        moe_intermediate_size=width,
        activation=act,
        router="sigmoid-groups",
        shared=Dense(
            intermediate_size=width * fields.size("n_shared_experts"), activation=act, gated=True
        ),
        n_group=fields.size("n_group"),
        topk_group=fields.size("topk_group"),
        norm_topk_prob=fields.flag("norm_topk_prob"),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
    )
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


def _yarn_scale(positions: RoPE) -> float:
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
    "deepseek_v3": read_deepseek_v3,
}
