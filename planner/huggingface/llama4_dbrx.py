"""Readers of llama4_text and dbrx (transformers 5.23, models/llama4/ and models/dbrx/)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.errors import ConfigError, check_choice, check_size, shown
from planner.huggingface.blocks import (
    LLAMA_NAMES,
    activation,
    causal_lm,
    gated,
    gqa,
    gqa_decoder,
    heads,
    layer_count,
    layer_windows,
    rmsnorm,
    rope,
)
from planner.huggingface.fields import Fields, check_positive
from planner.huggingface.later_decoders import local_layers, stated_heads
from planner.layers import ACTIVATIONS, Dense, Layer, MoE, Norm, QKNorm
from planner.model import Model

LLAMA4_NAMES = (
    *LLAMA_NAMES,
    ("mlp.gate", "mlp.router"),
    ("mlp.shared_experts", "mlp.shared_expert"),
    ("mlp", "feed_forward"),
)
DBRX_NAMES = (
    ("embed_tokens", "transformer.wte"),
    ("layers", "transformer.blocks"),
    ("norm", "transformer.norm_f"),
    ("input_layernorm", "norm_attn_norm.norm_1"),
    ("post_attention_layernorm", "norm_attn_norm.norm_2"),
    ("self_attn.qkv_proj", "norm_attn_norm.attn.Wqkv"),
    ("self_attn.o_proj", "norm_attn_norm.attn.out_proj"),
    ("mlp.gate", "ffn.router.layer"),
    ("mlp.experts.gate_proj", "ffn.experts.mlp.w1"),
    ("mlp.experts.up_proj", "ffn.experts.mlp.v1"),
    ("mlp.experts.down_proj", "ffn.experts.mlp.w2"),
)


def read_llama4_text(fields: Fields) -> Model:
    """Llama 4: layers with positions attend in chunks, the others everywhere; q and k normed there.

    Mixtures stand where `moe_layers` or `interleave_moe_layer_step` says, dense layers between are
    `intermediate_size_mlp` wide.
    """
    H, G, D = stated_heads(fields)
    bias, chunk = fields.flag("attention_bias"), fields.size("attention_chunk_size")
    norm, L, act = rmsnorm(fields), layer_count(fields), activation(fields)
    turned = _llama4_rope_layers(fields, L)
    local = local_layers(fields, lambda i: turned[i], word="chunked_attention")
    mixed = _llama4_moe_layers(fields, L)
    qk_norm = None
    if fields.flag("use_qk_norm"):
        qk_norm = QKNorm(norm=Norm(kind="rmsnorm", eps=norm.eps, weight=False), width="head")
    temperature = None
    if fields.flag("attn_temperature_tuning"):
        temperature = fields.number("attn_scale"), fields.number("floor_scale")
    width = fields.size("intermediate_size")
    moe = MoE(
        num_experts=fields.size("num_local_experts"),
        linear_router=True,
        num_experts_per_tok=fields.size("num_experts_per_tok"),
        moe_intermediate_size=width,
        activation=act,
        router="sigmoid",
        layout="transposed",
        shared=Dense(intermediate_size=width, activation=act, gated=True),
        norm_topk_prob=False,
    )
    dense = gated(fields, size_field="intermediate_size_mlp")

    def layer(turns: bool, chunked: bool, mixture: bool) -> Layer:
        attention = gqa(
            (H, G, D),
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=qk_norm if turns else None,
            rope=turns,
            sliding_window=chunk if chunked else None,
            chunked=chunked,
            temperature=None if turns else temperature,
        )
        return Layer(attention=attention, feed_forward=moe if mixture else dense, norm=norm)

    kinds = list(zip(turned, local, mixed, strict=True))
    made = {kind: layer(*kind) for kind in set(kinds)}
    return causal_lm(
        fields,
        layers=tuple(made[kind] for kind in kinds),
        final_norm=norm,
        positions=rope(fields, head_dim=D, interleaved=True),
        names=LLAMA4_NAMES,
        base_class="Llama4TextModel",
        head_class="Llama4ForCausalLM",
        mask_windows=(None, chunk),
    )


def _llama4_rope_layers(fields: Fields, L: int) -> list[bool]:
    """`no_rope_layers` says 1 where there are positions; empty: all but every fourth layer."""
    listed = fields.raw("no_rope_layers")
    if not listed:
        every = fields.size("no_rope_layer_interval")
        return [(i + 1) % every != 0 for i in range(L)]
    if not isinstance(listed, list) or len(listed) != L or any(x not in (0, 1) for x in listed):
        raise ConfigError(f"no_rope_layers={shown(listed)} is not allowed: a list of {L} of 0, 1")
    return [bool(x) for x in listed]


def _llama4_moe_layers(fields: Fields, L: int) -> list[bool]:
    listed = fields.raw("moe_layers")
    if listed is None:
        step = fields.size("interleave_moe_layer_step")
        return [(i + 1) % step == 0 for i in range(L)]
    if not isinstance(listed, list) or any(not isinstance(x, int) for x in listed):
        raise ConfigError(f"moe_layers={shown(listed)} is not allowed: a list of layer numbers")
    return [i in listed for i in range(L)]


def read_dbrx(fields: Fields) -> Model:
    """DBRX: fused and clipped q, k, v; experts in three flat matrices; sizes in sub-configs.

    Its rotary base is the config's own `rope_theta`, not the one in `attn_config`, which its class
    requires all the same.
    """
    if fields.flag("tie_word_embeddings"):
        raise ConfigError("tie_word_embeddings=True is not allowed for dbrx: false")
    attn, ffn = _part(fields, "attn_config"), _part(fields, "ffn_config")
    if "rope_theta" not in attn:
        raise ConfigError("attn_config.rope_theta is missing from the config: a number above 0")
    H, _, D = heads(fields)
    G = check_size("attn_config.kv_n_heads", attn.get("kv_n_heads", 1))
    clip = attn.get("clip_qkv")
    power = ffn.get("moe_normalize_expert_weights", 1.0)
    if power not in (None, 1):
        raise ConfigError(
            f"ffn_config.moe_normalize_expert_weights={shown(power)} is not allowed: 1 or null"
        )
    act = ffn.get("ffn_act_fn") or {"name": "silu"}
    if not isinstance(act, Mapping):
        raise ConfigError(f"ffn_config.ffn_act_fn={shown(act)} is not allowed: an object")
    norm = Norm(kind="layernorm", eps=1e-5)  # nn.LayerNorm's own
    return gqa_decoder(
        fields,
        stem="Dbrx",
        attention=gqa(
            (H, G, D),
            fused_qkv=True,
            clip_qkv=None if clip is None else check_positive("attn_config.clip_qkv", clip),
        ),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=MoE(
            linear_router=True,
            num_experts=check_size("ffn_config.moe_num_experts", ffn.get("moe_num_experts", 4)),
            num_experts_per_tok=check_size("ffn_config.moe_top_k", ffn.get("moe_top_k", 1)),
            moe_intermediate_size=check_size(
                "ffn_config.ffn_hidden_size", ffn.get("ffn_hidden_size", 3584)
            ),
            activation=check_choice(  # type: ignore[arg-type]
                "ffn_config.ffn_act_fn.name", act.get("name", "silu"), ACTIVATIONS
            ),
            router="softmax",
            layout="flat",
            norm_topk_prob=power is not None,
        ),
        norm=norm,
        positions=rope(fields, head_dim=D),
        names=DBRX_NAMES,
    )


def _part(fields: Fields, name: str) -> Mapping[str, Any]:
    """A sub-config; null and absent: all defaults."""
    part = fields.raw(name)
    if part is not None and not isinstance(part, Mapping):
        raise ConfigError(f"{name}={shown(part)} is not allowed: an object or null")
    return part or {}


READERS = {
    "dbrx": read_dbrx,
    "llama4_text": read_llama4_text,
}
