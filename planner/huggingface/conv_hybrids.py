"""Readers of lfm2, lfm2_moe and lfm3: short convolutions among attention layers."""

from __future__ import annotations

from typing import Any

from planner.errors import ConfigError, check_size, shown
from planner.huggingface.blocks import causal_lm, gqa, heads, layer_count, rope
from planner.huggingface.fields import Fields
from planner.huggingface.linear_attention import layer_kinds
from planner.huggingface.mixed import required_kv_heads
from planner.layers import GQA, Dense, Layer, MoE, Norm, QKNorm
from planner.mixers.recurrent import ShortConv
from planner.model import Model
from planner.tensors import Parameter, linear

CONV, FULL, SLIDING = "conv", "full_attention", "sliding_attention"
OUTER = (
    ("embed_tokens", "model.embed_tokens"),
    ("layers", "model.layers"),
    ("norm", "model.embedding_norm"),
)
BLOCK = (
    ("mlp", "feed_forward"),
    ("feed_forward.gate_proj", "feed_forward.w1"),
    ("feed_forward.up_proj", "feed_forward.w3"),
    ("feed_forward.down_proj", "feed_forward.w2"),
)
NAMES = (
    *OUTER,
    *BLOCK,
    ("input_layernorm", "operator_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "self_attn.out_proj"),
    ("self_attn.q_norm", "self_attn.q_layernorm"),
    ("self_attn.k_norm", "self_attn.k_layernorm"),
    ("feed_forward.gate.e_score_correction_bias", "feed_forward.expert_bias"),
)
LFM3_NAMES = (
    *OUTER,
    *BLOCK,
    ("input_layernorm", "operator_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffn_norm"),
)
LFM3_SANDWICH = (*LFM3_NAMES, ("post_attention_layernorm", "post_operator_norm"))
LFM3_PRE = (*LFM3_NAMES, ("post_attention_layernorm", "ffn_norm"))


def _tied(fields: Fields) -> bool:
    """`tie_embedding`, the checkpoints' name, wins over `tie_word_embeddings`."""
    return fields.flag("tie_embedding" if fields.has("tie_embedding") else "tie_word_embeddings")


def _swiglu(size: int) -> Dense:
    return Dense(intermediate_size=size, activation="silu", gated=True)


def _adjusted(fields: Fields) -> int:
    """`block_ff_dim` · 2/3 · multiplier, rounded up to `block_multiple_of`."""
    name = "block_ff_dim" if fields.has("block_ff_dim") else "intermediate_size"
    size = fields.size(name)
    if not fields.flag("block_auto_adjust_ff_dim"):
        return size
    step = fields.size("block_multiple_of")
    size = int(fields.number("block_ffn_dim_multiplier") * int(2 * size / 3))
    return check_size(name, step * -(-size // step))


def _hybrid(
    fields: Fields, *, stem: str, kinds: list[str], feed_forwards: list[Dense | MoE], **extra: Any
) -> Model:
    required_kv_heads(fields)
    H, G, D = heads(fields)
    norm = Norm(kind="rmsnorm", eps=fields.number("norm_eps"))
    mixers: dict[str, GQA | ShortConv] = {
        CONV: _short_conv(fields),
        FULL: gqa((H, G, D), qk_norm=QKNorm(norm=norm, width="head")),
    }
    return causal_lm(
        fields,
        layers=tuple(
            Layer(attention=mixers[kind], feed_forward=feed_forward, norm=norm)
            for kind, feed_forward in zip(kinds, feed_forwards, strict=True)
        ),
        final_norm=norm,
        positions=rope(fields, head_dim=D),
        names=NAMES,
        base_class=f"{stem}Model",
        head_class=f"{stem}ForCausalLM",
        tied=_tied(fields),
        **extra,
    )


def _short_conv(fields: Fields) -> ShortConv:
    return ShortConv(
        hidden_size=fields.size("hidden_size"),
        conv_kernel=fields.size("conv_L_cache"),
        conv_bias=fields.flag("conv_bias"),
    )


def read_lfm2(fields: Fields) -> Model:
    """LFM2: attention in `layer_types` or, older, in `full_attn_idxs`; absent: everywhere."""
    L, indices = layer_count(fields), fields.raw("full_attn_idxs")
    if indices is not None and not (
        isinstance(indices, list) and all(type(index) is int for index in indices)
    ):
        raise ConfigError(f"full_attn_idxs={shown(indices)} is not allowed: layer numbers")
    default = [FULL if indices is None or i in indices else CONV for i in range(L)]
    kinds = layer_kinds(fields, default, allowed=(CONV, FULL))
    return _hybrid(fields, stem="Lfm2", kinds=kinds, feed_forwards=[_swiglu(_adjusted(fields))] * L)


def read_lfm2_moe(fields: Fields) -> Model:
    """LFM2-MoE: the first `num_dense_layers` dense, then mixtures with a bias on the choice."""
    L, first = layer_count(fields), fields.size("num_dense_layers", minimum=0)
    if fields.raw("layer_types") is None:
        raise ConfigError("layer_types is missing from the config: a list of conv, full_attention")
    mixture = MoE(
        num_experts=fields.size("num_experts"),
        num_experts_per_tok=fields.size("num_experts_per_tok"),
        moe_intermediate_size=fields.size("moe_intermediate_size"),
        activation="silu",
        router="sigmoid-groups" if fields.flag("use_expert_bias") else "sigmoid",
        norm_topk_prob=fields.flag("norm_topk_prob"),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
    )
    dense = _swiglu(fields.size("intermediate_size"))
    return _hybrid(
        fields,
        stem="Lfm2Moe",
        kinds=layer_kinds(fields, [], allowed=(CONV, FULL)),
        feed_forwards=[dense if i < first else mixture for i in range(L)],
    )


def read_lfm3(fields: Fields) -> Model:
    """LFM3: convolutions, sliding and full attention; norms on both sides and a gate a head."""
    required_kv_heads(fields)
    L, (H, G, D) = layer_count(fields), heads(fields)
    default = [FULL if i % 4 == 2 else SLIDING if i % 4 == 0 and i > 0 else CONV for i in range(L)]
    kinds = layer_kinds(fields, default, allowed=(CONV, FULL, SLIDING))
    window = fields.optional_size("sliding_window")
    if window is None and SLIDING in kinds:
        raise ConfigError("sliding_window=None is not allowed: layer_types has sliding layers")
    norm, bias = Norm(kind="rmsnorm", eps=fields.number("norm_eps")), fields.flag("attention_bias")
    sandwich = fields.flag("use_sandwich_norm")
    gate: tuple[Parameter, ...] = ()
    if fields.flag("use_attention_gate"):
        into = fields.size("hidden_size")
        gate = tuple(linear("self_attn.g_proj", "attention", out=H, into=into, bias=False))

    def block(kind: str) -> Layer:
        qk_norm = QKNorm(norm=norm, width="head")
        local = window if kind == SLIDING else None
        attention = gqa(
            (H, G, D), qkv_bias=bias, o_bias=bias, qk_norm=qk_norm, sliding_window=local
        )
        return Layer(
            attention=_short_conv(fields) if kind == CONV else attention,
            feed_forward=_swiglu(fields.size("intermediate_size")),
            norm=norm,
            placement="sandwich" if sandwich else "pre",
            extra_parameters=() if kind == CONV else gate,
        )

    made = {kind: block(kind) for kind in set(kinds)}
    everywhere, local = (
        _rope_of(fields, kind, D, theta, share)
        for kind, theta, share in ((FULL, 1_000_000.0, 0.5), (SLIDING, 10_000.0, 1.0))
    )
    return causal_lm(
        fields,
        layers=tuple(made[kind] for kind in kinds),
        final_norm=norm,
        positions=everywhere,
        local_positions=local,
        names=LFM3_SANDWICH if sandwich else LFM3_PRE,
        base_class="Lfm3Model",
        head_class="Lfm3ForCausalLM",
    )


def _rope_of(fields: Fields, kind: str, D: int, theta: float, share: float) -> Any:
    """The rotary positions of one kind of layer; absent: its class's own."""
    given = fields.raw("rope_parameters")
    parameters = {"rope_theta": theta, "partial_rotary_factor": share}
    if given is not None:
        if not isinstance(given, dict) or not isinstance(given.get(kind, {}), dict):
            raise ConfigError(f"rope_parameters={shown(given)} is not allowed: an object a kind")
        parameters = given.get(kind, {})
    config = {**fields.config, "rope_parameters": parameters, "rope_scaling": None}
    return rope(
        Fields(config, fields.model_type),
        head_dim=D,
        partial=True,
        rope_types=("default", "proportional", "linear", "dynamic", "yarn", "longrope", "llama3"),
    )


READERS = {"lfm2": read_lfm2, "lfm2_moe": read_lfm2_moe, "lfm3": read_lfm3}
