"""Readers of mamba, falcon_mamba, mamba2, bamba, granitemoehybrid, jamba and falcon_h1."""

from __future__ import annotations

import math
from dataclasses import replace

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
from planner.huggingface.fields import Fields
from planner.huggingface.mixed import required_kv_heads
from planner.layers import GQA, Dense, Layer, MoE, NoPositions, Norm, Positions
from planner.mixers.mamba import Mamba, Mamba2
from planner.model import Model

MAMBA_NAMES = (
    ("embed_tokens", "backbone.embeddings"),
    ("layers", "backbone.layers"),
    ("norm", "backbone.norm_f"),
    ("input_layernorm", "norm"),
    ("gated_norm", "norm"),
    ("mamba", "mixer"),
)
HYBRID_NAMES = (
    ("embed_tokens", "model.embed_tokens"),
    ("layers", "model.layers"),
    ("norm", "model.final_layernorm"),
    ("post_attention_layernorm", "pre_ff_layernorm"),
    ("mlp", "feed_forward"),
    ("gate", "router"),
    ("gated_norm", "norm"),
)
GRANITE_NAMES = (
    ("embed_tokens", "model.embed_tokens"),
    ("layers", "model.layers"),
    ("norm", "model.norm"),
    ("gated_norm", "norm"),
    ("mlp.shared_experts.gate_up_proj", "shared_mlp.input_linear"),
    ("mlp.shared_experts.down_proj", "shared_mlp.output_linear"),
    ("mlp.gate_up_proj", "shared_mlp.input_linear"),
    ("mlp.down_proj", "shared_mlp.output_linear"),
    ("mlp", "block_sparse_moe"),
    ("gate", "router"),
)
KINDS = {
    "mamba": "linear_attention",
    "attention": "full_attention",
    "linear_attention": "linear_attention",
    "full_attention": "full_attention",
}
"""Today's and older names of a layer's kind."""


def _expanded(fields: Fields, name: str) -> int:
    """The mixer's width, expand · hidden_size."""
    return fields.size(name) * fields.size("hidden_size")


def _rank(fields: Fields, name: str) -> int:
    """The rank of the time step; "auto": ⌈hidden_size / 16⌉."""
    if fields.raw(name) == "auto":
        return -(-fields.size("hidden_size") // 16)
    return fields.size(name)


def _attention_free(fields: Fields, *, stem: str, mixer: Mamba | Mamba2) -> Model:
    """Blocks of one norm and one mixer."""
    norm = Norm(kind="rmsnorm", eps=fields.number("layer_norm_epsilon"))
    layer = Layer(attention=mixer, feed_forward=None, norm=norm, norms=("input_layernorm",))
    return causal_lm(
        fields,
        layers=(layer,) * layer_count(fields),
        final_norm=norm,
        positions=NoPositions(),
        unbounded=True,
        names=MAMBA_NAMES,
        base_class=f"{stem}Model",
        head_class=f"{stem}ForCausalLM",
        residual_in_fp32=fields.flag("residual_in_fp32"),
    )


def read_mamba(
    fields: Fields, *, stem: str = "Mamba", unscaled_norm_eps: float | None = None
) -> Model:
    """Mamba: no attention, no feed-forward; `intermediate_size` absent: expand · hidden_size."""
    mixer = Mamba(
        intermediate_size=fields.optional_size("intermediate_size") or _expanded(fields, "expand"),
        state_size=fields.size("state_size"),
        conv_kernel=fields.size("conv_kernel"),
        time_step_rank=_rank(fields, "time_step_rank"),
        use_bias=fields.flag("use_bias"),
        use_conv_bias=fields.flag("use_conv_bias"),
        activation=activation(fields),
        unscaled_norm_eps=unscaled_norm_eps,
    )
    return _attention_free(fields, stem=stem, mixer=mixer)


def read_falcon_mamba(fields: Fields) -> Model:
    """Falcon-Mamba: mamba with norms without a weight on B, C and the time step."""
    eps = fields.number("mixer_rms_eps")
    return read_mamba(fields, stem="FalconMamba", unscaled_norm_eps=eps)


def read_mamba2(fields: Fields) -> Model:
    """Mamba-2: heads · head_dim must be expand · hidden_size."""
    H, D = fields.size("num_heads"), fields.size("head_dim")
    wide = _expanded(fields, "expand")
    if wide != H * D:
        raise ConfigError(f"num_heads={H} · head_dim={D} is not expand · hidden_size = {wide}")
    bias = fields.flag("use_bias")
    mixer = Mamba2(
        num_heads=H,
        head_dim=D,
        n_groups=fields.size("n_groups"),
        state_size=fields.size("state_size"),
        conv_kernel=fields.size("conv_kernel"),
        use_conv_bias=fields.flag("use_conv_bias"),
        use_bias=bias,
        out_bias=bias,
        activation=activation(fields),
        time_step_limit=_time_step_limit(fields),
        chunk_size=fields.size("chunk_size"),
    )
    return _attention_free(fields, stem="Mamba2", mixer=mixer)


def _time_step_limit(fields: Fields) -> tuple[float, float]:
    """Bounds of the time step; transformers writes infinity as {"__float__": "Infinity"}."""
    given = fields.raw("time_step_limit")
    if given is None:
        return 0.0, math.inf
    bounds = [
        math.inf if bound == {"__float__": "Infinity"} else bound
        for bound in (given if isinstance(given, list | tuple) else ())
    ]
    if len(bounds) != 2 or any(type(bound) not in (int, float) for bound in bounds):
        raise ConfigError(f"time_step_limit={shown(given)} is not allowed: two numbers")
    return float(bounds[0]), float(bounds[1])


def _mamba2(fields: Fields, *, width: int | None = None) -> Mamba2:
    """The mixer of bamba and its kin; `width` is what heads · head_dim must make."""
    width = width or _expanded(fields, "mamba_expand")
    H = fields.size("mamba_n_heads")
    if width % H:
        raise ConfigError(f"mamba_n_heads={H} does not divide the mixer's {width} channels")
    D = width // H if fields.raw("mamba_d_head") == "auto" else fields.size("mamba_d_head")
    if width != H * D:
        raise ConfigError(f"mamba_n_heads={H} · mamba_d_head={D} is not {width}, its channels")
    bias = fields.flag("mamba_proj_bias")
    return Mamba2(
        num_heads=H,
        head_dim=D,
        n_groups=fields.size("mamba_n_groups"),
        state_size=fields.size("mamba_d_state"),
        conv_kernel=fields.size("mamba_d_conv"),
        use_conv_bias=fields.flag("mamba_conv_bias"),
        use_bias=bias,
        out_bias=bias,
        activation=activation(fields),
        time_step_limit=_time_step_limit(fields),
        chunk_size=fields.size("mamba_chunk_size"),
    )


def _attention(fields: Fields, *, bias: bool, rope: bool = True) -> GQA:
    return gqa(heads(fields), qkv_bias=bias, o_bias=bias, rope=rope)


def _kinds(fields: Fields) -> list[str]:
    """The kind of every layer in `layer_types`; absent: all of them mamba's."""
    L, given = layer_count(fields), fields.raw("layer_types")
    if given is None:
        return ["linear_attention"] * L
    if not isinstance(given, list) or len(given) != L:
        raise ConfigError(f"layer_types={shown(given)} is not allowed: a list of {L} words")
    for kind in given:
        if not isinstance(kind, str) or kind not in KINDS:
            raise ConfigError(f"layer_types has {shown(kind)}: one of {', '.join(KINDS)}")
    return [KINDS[kind] for kind in given]


def read_bamba(fields: Fields) -> Model:
    """Bamba: Mamba-2 but for the layers in `attn_layer_indices`; half of a head is rotated."""
    if fields.has("layer_types"):
        raise ConfigError("layer_types is not allowed: bamba takes attn_layer_indices")
    given = fields.raw("attn_layer_indices") or []
    if not isinstance(given, list) or not all(type(index) is int for index in given):
        raise ConfigError(f"attn_layer_indices={shown(given)} is not allowed: layer numbers")
    attention = _attention(fields, bias=fields.flag("attention_bias"))
    norm, feed_forward = rmsnorm(fields), gated(fields, bias=fields.flag("mlp_bias"))
    mamba = Layer(attention=_mamba2(fields), feed_forward=feed_forward, norm=norm)
    attending = replace(mamba, attention=attention)
    fields.suppose(partial_rotary_factor=0.5)
    return causal_lm(
        fields,
        layers=tuple(attending if i in given else mamba for i in range(layer_count(fields))),
        final_norm=norm,
        positions=rope(fields, head_dim=attention.head_dim, partial=True, partial_default=0.5),
        names=HYBRID_NAMES,
        base_class="BambaModel",
        head_class="BambaForCausalLM",
    )


def read_falcon_h1(fields: Fields) -> Model:
    """Falcon-H1: attention and Mamba-2 read the same norm in every block."""
    mixer = replace(
        _mamba2(fields, width=fields.optional_size("mamba_d_ssm")),
        out_bias=fields.flag("projectors_bias"),
        norm=fields.flag("mamba_rms_norm"),
    )
    attention = _attention(fields, bias=fields.flag("attention_bias"))
    norm = rmsnorm(fields)
    layer = Layer(
        attention=attention,
        beside=mixer,
        feed_forward=gated(fields, bias=fields.flag("mlp_bias")),
        norm=norm,
    )
    return causal_lm(
        fields,
        layers=(layer,) * layer_count(fields),
        final_norm=norm,
        positions=rope(fields, head_dim=attention.head_dim),
        names=HYBRID_NAMES,
        base_class="FalconH1Model",
        head_class="FalconH1ForCausalLM",
    )


def read_granitemoehybrid(fields: Fields) -> Model:
    """Granite 4: Mamba-2 or attention; a shared expert always, routed ones if there are any.

    Rotary positions only where `position_embedding_type` says so.
    """
    norm, act = rmsnorm(fields), activation(fields)
    shared = Dense(
        intermediate_size=fields.size("shared_intermediate_size"),
        activation=act,
        gated=True,
        fused_gate_up=True,
    )
    experts = fields.optional_size("num_local_experts", minimum=0) or 0
    feed_forward: Dense | MoE = shared
    if experts:
        feed_forward = MoE(
            num_experts=experts,
            num_experts_per_tok=fields.size("num_experts_per_tok"),
            moe_intermediate_size=fields.size("intermediate_size"),
            activation=act,
            router="softmax",
            shared=shared,
        )
    rotary = fields.raw("position_embedding_type") == "rope"
    attention = replace(
        _attention(fields, bias=fields.flag("attention_bias"), rope=rotary),
        scaling=fields.number("attention_multiplier"),
    )
    positions: Positions = NoPositions()
    if rotary:
        positions = rope(fields, head_dim=attention.head_dim)
    mamba = Layer(
        attention=_mamba2(fields),
        feed_forward=feed_forward,
        norm=norm,
        residual_multiplier=fields.number("residual_multiplier"),
    )
    attending = replace(mamba, attention=attention)
    return causal_lm(
        fields,
        layers=tuple(attending if kind == "full_attention" else mamba for kind in _kinds(fields)),
        final_norm=norm,
        positions=positions,
        names=GRANITE_NAMES,
        base_class="GraniteMoeHybridModel",
        head_class="GraniteMoeHybridForCausalLM",
        embedding_scale=fields.number("embedding_multiplier"),
        logit_scale=1 / fields.number("logits_scaling"),
    )


def read_jamba(fields: Fields) -> Model:
    """Jamba (arXiv:2403.19887): attention without positions every `attn_layer_period` layers.

    Mixtures every `expert_layer_period` layers; with one expert they are dense.
    """
    required_kv_heads(fields)
    L, norm, act = layer_count(fields), rmsnorm(fields), activation(fields)
    period, offset = _period(fields, "attn_layer")
    expert_period, expert_offset = _period(fields, "expert_layer")
    mixer = Mamba(
        intermediate_size=_expanded(fields, "mamba_expand"),
        state_size=fields.size("mamba_d_state"),
        conv_kernel=fields.size("mamba_d_conv"),
        time_step_rank=_rank(fields, "mamba_dt_rank"),
        use_bias=fields.flag("mamba_proj_bias"),
        use_conv_bias=fields.flag("mamba_conv_bias"),
        inner_norms=True,
        activation=act,
    )
    dense = gated(fields)
    mixture: Dense | MoE = dense
    if fields.size("num_experts", minimum=0) > 1:
        mixture = MoE(
            num_experts=fields.size("num_experts"),
            num_experts_per_tok=fields.size("num_experts_per_tok"),
            moe_intermediate_size=dense.intermediate_size,
            activation=act,
            router="softmax",
            norm_topk_prob=False,
        )
    attention = _attention(fields, bias=False, rope=False)
    made = {
        (attends, routed): Layer(
            attention=attention if attends else mixer,
            feed_forward=mixture if routed else dense,
            norm=norm,
        )
        for attends in (False, True)
        for routed in (False, True)
    }
    return causal_lm(
        fields,
        layers=tuple(
            made[i % period == offset, i % expert_period == expert_offset] for i in range(L)
        ),
        final_norm=norm,
        positions=NoPositions(),
        names=HYBRID_NAMES,
        base_class="JambaModel",
        head_class="JambaForCausalLM",
    )


def _period(fields: Fields, name: str) -> tuple[int, int]:
    """(`<name>_period`, `<name>_offset`), the offset below the period."""
    period, offset = fields.size(f"{name}_period"), fields.size(f"{name}_offset", minimum=0)
    check_size(f"{name}_offset", offset, minimum=0, maximum=period - 1)
    return period, offset


READERS = {
    "bamba": read_bamba,
    "falcon_h1": read_falcon_h1,
    "falcon_mamba": read_falcon_mamba,
    "granitemoehybrid": read_granitemoehybrid,
    "jamba": read_jamba,
    "mamba": read_mamba,
    "mamba2": read_mamba2,
}
