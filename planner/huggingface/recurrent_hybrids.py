"""Readers of nemotron_h, zamba2, recurrent_gemma and rwkv."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import replace

from planner.errors import ConfigError, check_size, shown
from planner.huggingface.blocks import causal_lm, gqa, heads, layer_count, plain, rmsnorm, rope
from planner.huggingface.fields import Fields
from planner.layers import ACTIVATIONS, GQA, Dense, Layer, MoE, NoPositions, Norm, Positions
from planner.mixers.mamba import Mamba2
from planner.mixers.recurrent import RGLRU, RWKV, SharedAttention
from planner.model import Model
from planner.tensors import Parameter, linear, tensor

NEMOTRON_NAMES = (
    ("embed_tokens", "model.embeddings"),
    ("layers", "model.layers"),
    ("norm", "model.norm_f"),
    ("input_layernorm", "norm"),
    ("gated_norm", "norm"),
    ("mamba", "mixer"),
    ("self_attn", "mixer"),
    ("mlp", "mixer"),
)
PATTERN = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
NEMOTRON_KINDS = {"mamba": "linear_attention", "attention": "full_attention"}
GRIFFIN_NAMES = (
    ("embed_tokens", "model.embed_tokens"),
    ("layers", "model.layers"),
    ("norm", "model.final_norm"),
    ("input_layernorm", "temporal_pre_norm"),
    ("post_attention_layernorm", "channel_pre_norm"),
    ("self_attn", "temporal_block"),
    ("mlp", "mlp_block"),
)
ZAMBA_NAMES = (
    ("embed_tokens", "model.embed_tokens"),
    ("layers", "model.layers"),
    ("norm", "model.final_layernorm"),
    ("gated_norm", "norm"),
)
RWKV_NAMES = (
    ("embed_tokens", "rwkv.embeddings"),
    ("layers", "rwkv.blocks"),
    ("norm", "rwkv.ln_out"),
    ("input_layernorm", "ln1"),
    ("post_attention_layernorm", "ln2"),
    ("lm_head", "head"),
)


def _as_computed(fields: Fields, **computed: int) -> None:
    """ConfigError where the config contradicts a size that its class computes."""
    for name, size in computed.items():
        if fields.config.get(name, size) != size:
            raise ConfigError(f"{name}={shown(fields.config[name])} is not allowed: {size}")


def _older(fields: Fields, name: str, older: str) -> int:
    """A size whose older name wins in transformers where both are there."""
    return fields.size(older) if older in fields.config else fields.size(name)


def _nemotron_kinds(fields: Fields) -> list[str]:
    """`layers_block_type`, else `hybrid_override_pattern`, a letter for each layer."""
    given = fields.raw("layers_block_type")
    pattern = fields.raw("hybrid_override_pattern")
    if given is None and pattern is not None:
        if not isinstance(pattern, str) or not pattern or set(pattern) - set(PATTERN):
            raise ConfigError(
                f"hybrid_override_pattern={shown(pattern)} is not allowed: letters of M E * -"
            )
        return [PATTERN[letter] for letter in pattern]
    if given is None:
        given = ["linear_attention", "moe", "full_attention", "mlp"]
        fields.take_default("layers_block_type", given)
    if not isinstance(given, list) or not given:
        raise ConfigError(f"layers_block_type={shown(given)} is not allowed: a list of words")
    kinds = [NEMOTRON_KINDS.get(kind, kind) if isinstance(kind, str) else kind for kind in given]
    for kind in kinds:
        if kind not in PATTERN.values():
            raise ConfigError(
                f"layers_block_type has {shown(kind)}: one of {', '.join(PATTERN.values())}"
            )
    return kinds


def read_nemotron_h(fields: Fields) -> Model:
    """Nemotron-H (arXiv:2504.03624): every block is one norm and one mixer, Mamba-2, attention
    without positions, a feed-forward or a mixture; the pattern says how many there are.
    """
    kinds = _nemotron_kinds(fields)
    H, G, D = heads(fields)
    norm = Norm(kind="rmsnorm", eps=fields.number("layer_norm_epsilon"))
    bias = fields.flag("use_bias")
    biased = fields.flag("mlp_bias")
    conv_bias = "mamba_conv_bias" if "mamba_conv_bias" in fields.config else "use_conv_bias"
    mamba = Mamba2(
        num_heads=fields.size("mamba_num_heads"),
        head_dim=fields.size("mamba_head_dim"),
        n_groups=_older(fields, "n_groups", "mamba_n_groups"),
        state_size=fields.size("ssm_state_size"),
        conv_kernel=_older(fields, "conv_kernel", "mamba_d_conv"),
        use_conv_bias=fields.flag(conv_bias),
        use_bias=bias,
        out_bias=bias,
        activation=fields.choice("mamba_hidden_act", ACTIVATIONS),
        time_step_limit=(fields.optional_number("time_step_min") or 0.0, math.inf),
        chunk_size=fields.size("chunk_size"),
    )
    dense = plain(fields, activation_field="mlp_hidden_act", bias=biased)
    block = Layer(attention=None, feed_forward=None, norm=norm, norms=("input_layernorm",))
    made = {
        "linear_attention": replace(block, attention=mamba),
        "full_attention": replace(block, attention=gqa((H, G, D), rope=False)),
        "mlp": replace(block, feed_forward=dense),
    }
    if "moe" in kinds:
        made["moe"] = replace(block, feed_forward=_nemotron_mixture(fields, dense))
    return causal_lm(
        fields,
        layers=tuple(made[kind] for kind in kinds),
        final_norm=norm,
        positions=NoPositions(),
        names=NEMOTRON_NAMES,
        base_class="NemotronHModel",
        head_class="NemotronHForCausalLM",
        tied=False,  # its class ties nothing, whatever the config says
    )


def _nemotron_mixture(fields: Fields, dense: Dense) -> MoE:
    shared = fields.size("moe_shared_expert_intermediate_size")
    return MoE(
        num_experts=fields.size("n_routed_experts"),
        num_experts_per_tok=fields.size("num_experts_per_tok"),
        moe_intermediate_size=fields.size("moe_intermediate_size"),
        activation=dense.activation,
        router="sigmoid-groups",
        shared=replace(dense, intermediate_size=shared),
        gated=False,
        latent_size=fields.optional_size("moe_latent_size"),
        latent_bias=dense.bias,
        n_group=fields.size("n_group"),
        topk_group=fields.size("topk_group"),
        norm_topk_prob=fields.flag("norm_topk_prob"),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
    )


def read_recurrent_gemma(fields: Fields) -> Model:
    """RecurrentGemma (arXiv:2404.07839): RG-LRU and local attention by `block_types`, repeated.

    The feed-forward is half of `intermediate_size` wide; there is no end of positions.
    """
    L, pattern = layer_count(fields), fields.raw("block_types")
    words = ("recurrent", "attention")
    if not isinstance(pattern, list) or not pattern or any(x not in words for x in pattern):
        raise ConfigError(f"block_types={shown(pattern)} is not allowed: recurrent, attention")
    H, h = fields.size("num_attention_heads"), fields.size("hidden_size")
    if h % H:
        raise ConfigError(f"hidden_size={h} is not a multiple of num_attention_heads={H}")
    G, D = fields.optional_size("num_key_value_heads") or H, h // H
    _as_computed(fields, head_dim=D)
    norm = rmsnorm(fields, plus_one=True)
    half = check_size("intermediate_size // 2", fields.size("intermediate_size") // 2)
    dense = plain(fields, activation_field="hidden_activation", intermediate_size=half)
    attention = gqa(
        (H, G, D),
        qkv_bias=fields.flag("attention_bias"),
        o_bias=True,
        sliding_window=fields.size("attention_window_size"),
    )
    mixer = RGLRU(
        lru_width=fields.optional_size("lru_width") or h,
        num_attention_heads=H,
        conv1d_width=fields.size("conv1d_width", minimum=2),
        activation=dense.activation,
    )
    recurrent = Layer(attention=mixer, feed_forward=replace(dense, gated=True), norm=norm)
    local = replace(recurrent, attention=attention)
    return causal_lm(
        fields,
        layers=tuple(
            local if pattern[i % len(pattern)] == "attention" else recurrent for i in range(L)
        ),
        final_norm=norm,
        positions=rope(fields, head_dim=D, partial=True, partial_default=0.5),
        unbounded=True,
        names=GRIFFIN_NAMES,
        base_class="RecurrentGemmaModel",
        head_class="RecurrentGemmaForCausalLM",
        embedding_scale=_in_bfloat16(h**0.5),
        final_logit_softcapping=fields.optional_number("logits_soft_cap"),
    )


def _in_bfloat16(number: float) -> float:
    """Rounded to bfloat16, to even: what its class keeps whatever the model's dtype."""
    (bits,) = struct.unpack("<I", struct.pack("<f", number))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", rounded))[0])


def read_rwkv(fields: Fields) -> Model:
    """RWKV-4: its class is trained on `context_length` tokens and runs on without end."""
    h = fields.size("hidden_size")
    norm = Norm(kind="layernorm", eps=fields.number("layer_norm_epsilon"), bias=True)
    mixer = RWKV(
        attention_hidden_size=fields.optional_size("attention_hidden_size") or h,
        intermediate_size=fields.optional_size("intermediate_size") or 4 * h,
    )
    if mixer.attention_hidden_size != h:
        raise ConfigError(
            f"attention_hidden_size={mixer.attention_hidden_size} is not allowed: hidden_size={h}, "
            "its class fails with another"
        )
    block = Layer(attention=mixer, feed_forward=None, norm=norm)
    first = replace(
        block,
        extra_parameters=(
            tensor("pre_ln.weight", h, group="norm"),
            tensor("pre_ln.bias", h, group="norm"),
        ),
    )
    return causal_lm(
        fields,
        layers=(first, *(block,) * (layer_count(fields) - 1)),
        final_norm=norm,
        positions=NoPositions(),
        unbounded=True,
        names=RWKV_NAMES,
        base_class="RwkvModel",
        head_class="RwkvForCausalLM",
    )


def read_zamba2(fields: Fields) -> Model:
    """Zamba2 (arXiv:2411.15242): Mamba-2, and in hybrid layers a transformer block before it.

    There are `num_mem_blocks` such blocks, taken in turn: their weights count once, in the first
    layer that uses each, with an adapter for every use; each use has a cache of its own.
    """
    L, h = layer_count(fields), fields.size("hidden_size")
    kinds = _zamba_kinds(fields, L)
    H = fields.size("num_attention_heads")
    if 2 * h % H:
        raise ConfigError(f"num_attention_heads={H} does not divide 2 · hidden_size = {2 * h}")
    G, D = fields.optional_size("num_key_value_heads") or H, 2 * h // H
    if G != H and fields.flag("use_shared_attention_adapter"):
        raise ConfigError(
            f"num_key_value_heads={G} is not allowed: {H}, its class adds adapters for all heads"
        )
    shared = GQA(num_attention_heads=H, num_key_value_heads=G, head_dim=D, scaling=(D / 2) ** -0.5)
    width, heads_ = fields.size("mamba_expand") * h, fields.size("n_mamba_heads")
    if width % heads_:
        raise ConfigError(f"n_mamba_heads={heads_} does not divide mamba_expand · {h} = {width}")
    bias = fields.flag("add_bias_linear")
    mamba = Mamba2(
        num_heads=heads_,
        head_dim=width // heads_,
        n_groups=fields.size("mamba_ngroups"),
        state_size=fields.size("mamba_d_state"),
        conv_kernel=fields.size("mamba_d_conv"),
        use_conv_bias=True,  # its class ignores the flag
        use_bias=bias,
        out_bias=bias,
        chunk_size=fields.size("chunk_size"),
    )
    _as_computed(
        fields, attention_head_dim=D, attention_hidden_size=2 * h, mamba_headdim=width // heads_
    )
    norm = rmsnorm(fields)
    block = Layer(attention=mamba, feed_forward=None, norm=norm, norms=("input_layernorm",))
    hybrid = replace(
        block,
        attention=replace(mamba, path="mamba_decoder.mamba"),
        beside=SharedAttention(num_key_value_heads=G, head_dim=D),
        norms=("mamba_decoder.input_layernorm",),
        extra_parameters=tuple(linear("linear", "attention", out=h, into=h, bias=False)),
    )
    places = [i for i, kind in enumerate(kinds) if kind == "hybrid"]
    blocks = fields.size("num_mem_blocks")
    layers = [hybrid if kind == "hybrid" else block for kind in kinds]
    tied = fields.flag("tie_word_embeddings")
    owners = places[:blocks] if tied else places
    for number, place in enumerate(owners):  # untied, every hybrid layer has a block of its own
        uses = range(number % blocks, len(places), blocks)
        several = tied and len(uses) > 1
        owned = tuple(replace(p, shared=several) for p in _zamba_block(fields, shared, uses))
        layers[place] = replace(hybrid, extra_parameters=(*hybrid.extra_parameters, *owned))
    positions: Positions = NoPositions()
    if fields.flag("use_mem_rope"):
        positions = rope(fields, head_dim=D)
    limit = 16_384 if fields.flag("use_long_context") else None
    return causal_lm(
        fields,
        layers=tuple(layers),
        final_norm=norm,
        positions=positions,
        names=ZAMBA_NAMES,
        base_class="Zamba2Model",
        head_class="Zamba2ForCausalLM",
        max_position_embeddings=limit,
    )


def _zamba_kinds(fields: Fields, L: int) -> list[str]:
    given = fields.raw("layers_block_type")
    if given is None:
        mamba = ["mamba"]
        given = mamba + (mamba * 5 + ["hybrid"]) * 7 + mamba * 4 + ["hybrid"] + mamba * 3
        given = [*given, "hybrid", "mamba", "mamba"]
    words = ("mamba", "linear_attention", "hybrid")
    if not isinstance(given, list) or any(kind not in words for kind in given):
        raise ConfigError(f"layers_block_type={shown(given)} is not allowed: mamba, hybrid")
    if len(given) != L:
        raise ConfigError(f"layers_block_type={shown(given)} is not allowed: {L} words")
    return given


def _zamba_block(fields: Fields, attention: GQA, uses: range) -> Iterator[Parameter]:
    """The weights of one shared block, with adapters for the hybrid layers in `uses`."""
    h = fields.size("hidden_size")
    i = fields.optional_size("intermediate_size") or 4 * h
    rank, bias = fields.size("adapter_rank"), fields.flag("add_bias_linear")
    H, G, D = attention.num_attention_heads, attention.num_key_value_heads, attention.head_dim
    path = "shared_transformer"
    for letter, out in (("q", H * D), ("k", G * D), ("v", G * D)):
        yield from linear(
            f"{path}.self_attn.{letter}_proj", "attention", out=out, into=2 * h, bias=False
        )
    yield from linear(f"{path}.self_attn.o_proj", "attention", out=h, into=H * D, bias=False)
    for name, out, into in (("gate_up_proj", 2 * i, h), ("down_proj", h, i)):
        yield from linear(
            f"{path}.feed_forward.{name}", "feed_forward", out=out, into=into, bias=bias
        )
    adapters = [("feed_forward.gate_up_proj_adapter_list", h, 2 * i)]
    if fields.flag("use_shared_attention_adapter"):
        adapters += [(f"self_attn.linear_{letter}_adapter_list", 2 * h, 2 * h) for letter in "qkv"]
    for name, into, out in adapters:
        for use in uses:
            for step, (rows, columns) in enumerate(((rank, into), (out, rank))):
                yield from linear(
                    f"{path}.{name}.{use}.{step}", "attention", out=rows, into=columns, bias=False
                )
    yield tensor(f"{path}.input_layernorm.weight", 2 * h, group="norm")
    yield tensor(f"{path}.pre_ff_layernorm.weight", h, group="norm")


READERS = {
    "nemotron_h": read_nemotron_h,
    "recurrent_gemma": read_recurrent_gemma,
    "rwkv": read_rwkv,
    "zamba2": read_zamba2,
}
