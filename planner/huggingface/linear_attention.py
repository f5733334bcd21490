"""Readers of qwen3_next, qwen3_5_text, qwen3_5_moe_text, olmo_hybrid, kimi_linear and minimax."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from planner.errors import ConfigError, check_size, shown
from planner.huggingface.blocks import (
    activation,
    causal_lm,
    gated,
    gqa,
    heads,
    layer_count,
    rmsnorm,
    rope,
)
from planner.huggingface.deepseek import latent_attention, sigmoid_group_mixture
from planner.huggingface.fields import Fields
from planner.huggingface.mixed import required_kv_heads, sparse_layers
from planner.huggingface.qwen_gemma import qwen_mixture
from planner.layers import GQA, MLA, Dense, Layer, MoE, NoPositions, QKNorm
from planner.mixers import Mixer
from planner.mixers.linear import GatedDeltaNet, KimiDelta, LightningAttention
from planner.model import Model

LINEAR, FULL = "linear_attention", "full_attention"
OLD_WORDS = {"mamba": LINEAR, "attention": FULL}
"""transformers 5.23 renames them in every config (configuration_utils.remap_legacy_layer_types)."""

NAMES = (
    ("embed_tokens", "model.embed_tokens"),
    ("layers", "model.layers"),
    ("norm", "model.norm"),
    ("gated_norm", "norm"),
    ("inner_norm", "norm"),
    ("mlp.shared_experts", "mlp.shared_expert"),
)


def layer_kinds(fields: Fields, default: list[str], *, allowed: tuple[str, ...]) -> list[str]:
    """`layer_types`, or what its class makes where it is absent."""
    L, given = layer_count(fields), fields.raw("layer_types")
    if given is None:
        return default
    if not isinstance(given, list) or len(given) != L:
        raise ConfigError(f"layer_types={shown(given)} is not allowed: a list of {L} words")
    kinds = [OLD_WORDS.get(kind, kind) if isinstance(kind, str) else kind for kind in given]
    for kind in kinds:
        if kind not in allowed:
            raise ConfigError(f"layer_types has {shown(kind)}: one of {', '.join(allowed)}")
    return kinds


def _every(fields: Fields) -> list[str]:
    """Full attention in every `full_attention_interval`-th layer, 4 where it is absent."""
    name, interval = "full_attention_interval", 4
    if fields.has(name) and fields.raw("layer_types") is None:
        interval = fields.size(name)
    default = [LINEAR if (i + 1) % interval else FULL for i in range(layer_count(fields))]
    return layer_kinds(fields, default, allowed=(LINEAR, FULL))


def _delta_net(
    fields: Fields, projections: Literal["fused", "split", "separate"], **sizes: int
) -> GatedDeltaNet:
    def size(name: str) -> int:
        return sizes.get(name) or fields.size(name)

    return GatedDeltaNet(
        linear_num_key_heads=size("linear_num_key_heads"),
        linear_num_value_heads=size("linear_num_value_heads"),
        linear_key_head_dim=size("linear_key_head_dim"),
        linear_value_head_dim=size("linear_value_head_dim"),
        linear_conv_kernel_dim=fields.size("linear_conv_kernel_dim"),
        projections=projections,
        activation=activation(fields),
    )


def _qwen_hybrid(
    fields: Fields,
    *,
    stem: str,
    projections: Literal["fused", "split"],
    feed_forwards: list[Dense | MoE],
    text_stem: str | None = None,
) -> Model:
    """Gated DeltaNet, and attention with an output gate in the full layers."""
    required_kv_heads(fields)
    fields.size("head_dim")
    norm, bias = rmsnorm(fields, plus_one=True), fields.flag("attention_bias")
    attention = gqa(
        heads(fields),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=QKNorm(norm=norm, width="head"),
        output_gate=True,
    )
    mixers: dict[str, GQA | MLA | Mixer] = {
        LINEAR: _delta_net(fields, projections),
        FULL: attention,
    }
    return causal_lm(
        fields,
        layers=tuple(
            Layer(attention=mixers[kind], feed_forward=feed_forward, norm=norm)
            for kind, feed_forward in zip(_every(fields), feed_forwards, strict=True)
        ),
        final_norm=norm,
        positions=rope(fields, head_dim=attention.head_dim, partial=True, partial_default=0.25),
        names=NAMES,
        base_class=f"{text_stem or stem}Model",
        head_class=f"{stem}ForCausalLM",
    )


def _qwen_experts(fields: Fields) -> MoE | None:
    shared = gated(fields, size_field="shared_expert_intermediate_size")
    return qwen_mixture(fields, shared=shared)


def read_qwen3_next(fields: Fields) -> Model:
    """Qwen3-Next: three layers of Gated DeltaNet to one of gated attention; mixtures."""
    dense, mixture = gated(fields), _qwen_experts(fields)
    return _qwen_hybrid(
        fields,
        stem="Qwen3Next",
        projections="fused",
        feed_forwards=sparse_layers(fields, dense=dense, mixture=mixture),
    )


def read_qwen3_5_text(fields: Fields) -> Model:
    """Qwen3.5's language model, dense."""
    return _qwen_hybrid(
        fields,
        stem="Qwen3_5",
        text_stem="Qwen3_5Text",
        projections="split",
        feed_forwards=[gated(fields)] * layer_count(fields),
    )


def read_qwen3_5_moe_text(fields: Fields) -> Model:
    """Qwen3.5's language model with a mixture in every layer."""
    mixture = _qwen_experts(fields)
    if mixture is None:
        raise ConfigError("num_experts=0 is not allowed: a whole number ≥ 1")
    mixture = replace(mixture, norm_topk_prob=True)  # its router does, and has no field for it
    return _qwen_hybrid(
        fields,
        stem="Qwen3_5Moe",
        text_stem="Qwen3_5MoeText",
        projections="split",
        feed_forwards=[mixture] * layer_count(fields),
    )


def read_olmo_hybrid(fields: Fields) -> Model:
    """OLMo Hybrid: Gated DeltaNet with norms before, attention with norms behind (olmo2's).

    Positions are rotary unless `rope_theta` is there and null, as in the released checkpoints.
    """
    L, h, H = layer_count(fields), fields.size("hidden_size"), fields.size("num_attention_heads")
    G = fields.optional_size("num_key_value_heads") or H
    # the class takes a head_dim that it has no field for, and rounds hidden_size / heads down
    D = fields.size("head_dim") if fields.has("head_dim") else check_size("head_dim", h // H)
    default = [FULL if i % 4 == 3 else LINEAR for i in range(L)]
    if FULL not in default:
        default[-1] = FULL
    kinds = layer_kinds(fields, default, allowed=(LINEAR, FULL))
    if len(set(kinds)) == 1:
        raise ConfigError(f"layer_types has {kinds[0]} alone: olmo_hybrid needs both kinds")
    norm, bias = rmsnorm(fields), fields.flag("attention_bias")
    attention = gqa((H, G, D), qkv_bias=bias, o_bias=bias, qk_norm=QKNorm(norm=norm, width="full"))
    keys = fields.optional_size("linear_num_key_heads") or H
    d_k = fields.optional_size("linear_key_head_dim")
    if d_k is None:
        d_k = check_size("linear_key_head_dim", int(0.75 * h / keys))
    mixer = _delta_net(
        fields,
        "separate",
        linear_num_key_heads=keys,
        linear_num_value_heads=fields.optional_size("linear_num_value_heads") or H,
        linear_key_head_dim=d_k,
        linear_value_head_dim=fields.optional_size("linear_value_head_dim") or 2 * d_k,
    )
    mixer = replace(
        mixer,
        allow_neg_eigval=fields.flag("linear_allow_neg_eigval"),
        norm_eps=1e-5,  # its class's own, whatever rms_norm_eps says
    )
    linear = Layer(attention=mixer, feed_forward=gated(fields), norm=norm)
    full = replace(linear, attention=attention, placement="post")
    return causal_lm(
        fields,
        layers=tuple(full if kind == FULL else linear for kind in kinds),
        final_norm=norm,
        positions=NoPositions() if _no_theta(fields) else rope(fields, head_dim=D),
        names=NAMES,
        base_class="OlmoHybridModel",
        head_class="OlmoHybridForCausalLM",
    )


def _no_theta(fields: Fields) -> bool:
    """Whether `rope_theta` is null, and not absent, where the class looks for it first."""
    parameters = fields.raw("rope_scaling") or fields.raw("rope_parameters") or {}
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        return parameters["rope_theta"] is None
    return fields.has("rope_theta") and fields.raw("rope_theta") is None


def read_kimi_linear(fields: Fields) -> Model:
    """Kimi Linear (arXiv:2510.26692): delta attention, and MLA without positions.

    Checkpoints number the layers of `linear_attn_config` from 1.
    """
    L, own = layer_count(fields), fields.config.get("linear_attn_config", {})
    if not isinstance(own, dict):
        raise ConfigError(f"linear_attn_config={shown(own)} is not allowed: an object")
    default = [FULL if i and i % 4 == 0 else LINEAR for i in range(L)]
    if "full_attn_layers" in own and "kda_layers" in own:
        default = _numbered(own, L)
    kinds = layer_kinds(fields, default, allowed=(LINEAR, FULL))

    def size(name: str, field: str) -> int:
        return check_size(field, own[name]) if name in own else fields.size(field)

    mixer = KimiDelta(
        linear_num_heads=size("num_heads", "linear_num_heads"),
        linear_head_dim=size("head_dim", "linear_head_dim"),
        linear_conv_kernel_dim=size("short_conv_kernel_size", "linear_conv_kernel_dim"),
        activation=activation(fields),
    )
    attention = latent_attention(fields, None)
    H, G = attention.num_attention_heads, fields.optional_size("num_key_value_heads")
    if G is not None and H // G != 1:  # the class repeats keys that often, one for each head
        raise ConfigError(f"num_key_value_heads={G} is not allowed: num_attention_heads={H}")
    norm = rmsnorm(fields)
    dense, moe = gated(fields), sigmoid_group_mixture(fields, experts="num_local_experts")
    mixers: dict[str, GQA | MLA | Mixer] = {LINEAR: mixer, FULL: attention}
    return causal_lm(
        fields,
        layers=tuple(
            Layer(attention=mixers[kind], feed_forward=moe if sparse else dense, norm=norm)
            for kind, sparse in zip(kinds, sparse_flags(fields, absent=1), strict=True)
        ),
        final_norm=norm,
        positions=NoPositions(),
        names=(*NAMES[:-1],),
        base_class="KimiLinearModel",
        head_class="KimiLinearForCausalLM",
        tied=False,  # its class ties nothing, whatever the config says
    )


def _numbered(own: dict[str, Any], L: int) -> list[str]:
    kinds: list[str | None] = [None] * L
    for name, kind in (("full_attn_layers", FULL), ("kda_layers", LINEAR)):
        numbers = own[name]
        if not isinstance(numbers, list):
            raise ConfigError(f"linear_attn_config.{name}={shown(numbers)}: layer numbers from 1")
        for number in numbers:
            kinds[check_size(f"linear_attn_config.{name}", number, maximum=L) - 1] = kind
    if None in kinds:
        raise ConfigError(f"linear_attn_config leaves layer {kinds.index(None) + 1} out")
    return [str(kind) for kind in kinds]


def sparse_flags(fields: Fields, *, absent: int) -> list[bool]:
    """Which layers are mixtures: `mlp_layer_types`, else all from `first_k_dense_replace` on."""
    L, given = layer_count(fields), fields.raw("mlp_layer_types")
    if given is None:
        name = "first_k_dense_replace"
        first = fields.size(name, minimum=0) if fields.has(name) else absent
        return [i >= first for i in range(L)]
    words = ("dense", "sparse")
    if not isinstance(given, list) or len(given) != L or any(x not in words for x in given):
        raise ConfigError(
            f"mlp_layer_types={shown(given)} is not allowed: a list of {L} of dense, sparse"
        )
    return [kind == "sparse" for kind in given]


def read_minimax(fields: Fields) -> Model:
    """MiniMax-01 (arXiv:2501.08313): lightning attention, full attention in every other layer."""
    required_kv_heads(fields)
    L, (H, G, D) = layer_count(fields), heads(fields)
    default = [LINEAR if (i + 1) % 2 == 0 else FULL for i in range(L)]
    kinds = layer_kinds(fields, default, allowed=(LINEAR, FULL))
    if fields.optional_size("sliding_window") is not None:
        raise ConfigError("sliding_window is not allowed: null, minimax caches whole layers")
    norm = rmsnorm(fields)
    mixture = MoE(
        num_experts=fields.size("num_local_experts"),
        num_experts_per_tok=fields.size("num_experts_per_tok"),
        moe_intermediate_size=fields.size("intermediate_size"),
        activation=activation(fields),
        router="softmax",
    )
    mixers: dict[str, GQA | MLA | Mixer] = {
        LINEAR: LightningAttention(num_attention_heads=H, head_dim=D),
        FULL: gqa((H, G, D)),
    }
    return causal_lm(
        fields,
        layers=tuple(
            Layer(attention=mixers[kind], feed_forward=mixture, norm=norm) for kind in kinds
        ),
        final_norm=norm,
        positions=rope(fields, head_dim=D),
        names=NAMES,
        base_class="MiniMaxModel",
        head_class="MiniMaxForCausalLM",
    )


READERS = {
    "kimi_linear": read_kimi_linear,
    "minimax": read_minimax,
    "olmo_hybrid": read_olmo_hybrid,
    "qwen3_5_moe_text": read_qwen3_5_moe_text,
    "qwen3_5_text": read_qwen3_5_text,
    "qwen3_next": read_qwen3_next,
}
