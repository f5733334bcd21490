"""The parameter table of a model: name, group, layer, shape of every trained tensor.

Shapes and names are those of the model's class in transformers (version in constraints.txt), so
that a row can be laid beside `named_parameters()`. Each module is listed once, under the llama
family's names; `Model.parameter_names` translates for families that use other words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import assert_never

from planner.layers import GQA, MLA, Dense, Indexer, Layer, MoE, Norm, Placement, QKNorm
from planner.mixers import Mixer
from planner.tensors import Parameter, linear, tensor

NORMS: dict[Placement, tuple[str, ...]] = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "post-sum": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "parallel": ("input_layernorm",),
    "parallel-two": ("input_layernorm", "post_attention_layernorm"),
}
"""The norms of a block, by where they stand."""


@lru_cache(maxsize=1024)
def layer_parameters(layer: Layer, hidden_size: int) -> tuple[Parameter, ...]:
    """Parameters of one block of width `hidden_size`, named relative to the block, `layer=None`.

    A linear layer's weight has shape [out, in].
    """
    h = hidden_size
    norms = NORMS[layer.placement] if layer.norms is None else layer.norms
    return (
        *_mixer(layer.attention, h),
        *_mixer(layer.beside, h),
        *_cross_attention(layer, h),
        *_feed_forward(layer.feed_forward, h),
        *(p for name in norms for p in norm_parameters(layer.norm, name, h)),
        *layer.extra_parameters,
    )


def norm_parameters(norm: Norm, name: str, width: int) -> Iterator[Parameter]:
    """The scale and the bias, as far as the norm has them."""
    if norm.weight:
        yield tensor(f"{name}.weight", width, group="norm")
    if norm.bias:
        yield tensor(f"{name}.bias", width, group="norm")


def _mixer(mixer: GQA | MLA | Mixer | None, h: int) -> Iterator[Parameter]:
    match mixer:
        case GQA() | MLA():
            yield from _attention(mixer, h)
        case Mixer():
            yield from mixer.parameters(h)


def _cross_attention(layer: Layer, h: int) -> Iterator[Parameter]:
    """The decoder's attention to the encoder: that of `self_attn` by another name, and its norm."""
    if layer.cross_attention is None:
        return
    for p in _attention(layer.cross_attention, h):
        yield replace(p, name=p.name.replace("self_attn", "cross_attn"))
    yield from norm_parameters(layer.norm, "cross_attention_layernorm", h)


def _attention(attention: GQA | MLA, h: int) -> Iterator[Parameter]:
    match attention:
        case GQA(num_attention_heads=H, num_key_value_heads=G, head_dim=D, qkv_bias=bias):
            heads = {"q": H * (1 + attention.output_gate), "k": G, "v": G}
            if attention.attention_k_eq_v:
                del heads["v"]
            if attention.shares_cache:
                heads = {"q": heads["q"]}
            outs = {letter: count * D for letter, count in heads.items()}
            if attention.fused_qkv:
                outs = {"qkv": (H + 2 * G) * D}
            for letter, out in outs.items():
                name, biased = f"self_attn.{letter}_proj", bias and letter not in attention.unbiased
                yield from linear(name, "attention", out=out, into=h, bias=biased)
            yield from linear(
                "self_attn.o_proj", "attention", out=h, into=H * D, bias=attention.o_bias
            )
            if attention.qk_norm is not None:
                for letter in "qk":
                    if letter in heads:
                        yield from _qk_norm(attention.qk_norm, letter, heads[letter], D)
            if attention.sinks:
                yield tensor("self_attn.sinks", H)
        case MLA(num_attention_heads=H, q_lora_rank=d_q, kv_lora_rank=d_c, bias=bias):
            latent = Norm(kind="rmsnorm", eps=1e-6)
            D, D_rope, D_nope = (
                attention.qk_head_dim,
                attention.qk_rope_head_dim,
                attention.qk_nope_head_dim,
            )
            if d_q is None:
                yield from linear("self_attn.q_proj", "attention", out=H * D, into=h, bias=False)
            else:
                yield from linear("self_attn.q_a_proj", "attention", out=d_q, into=h, bias=bias)
                yield from norm_parameters(latent, "self_attn.q_a_layernorm", d_q)
                yield from linear(
                    "self_attn.q_b_proj", "attention", out=H * D, into=d_q, bias=False
                )
            if not attention.shares_cache:
                yield from linear(
                    "self_attn.kv_a_proj_with_mqa", "attention", out=d_c + D_rope, into=h, bias=bias
                )
                yield from norm_parameters(latent, "self_attn.kv_a_layernorm", d_c)
            up = H * (D_nope + attention.v_head_dim)
            yield from linear("self_attn.kv_b_proj", "attention", out=up, into=d_c, bias=False)
            yield from linear(
                "self_attn.o_proj", "attention", out=h, into=H * attention.v_head_dim, bias=bias
            )
            if attention.indexer is not None:
                yield from _indexer(attention.indexer, h, queries_from=d_q or h)
        case _:
            assert_never(attention)


def _indexer(indexer: Indexer, h: int, *, queries_from: int) -> Iterator[Parameter]:
    """Queries from the query's latent, one key for all heads, a weight for each head."""
    H, D, name = indexer.index_n_heads, indexer.index_head_dim, "self_attn.indexer"
    for part, out, into in (
        ("wq_b", H * D, queries_from),
        ("wk", D, h),
        ("weights_proj", H, h),
    ):
        yield from linear(f"{name}.{part}", "attention", out=out, into=into, bias=False)
    norm = Norm(kind="layernorm", eps=1e-6, bias=True)
    yield from norm_parameters(norm, f"{name}.k_norm", D)
    if indexer.own_queries:
        yield from norm_parameters(norm, f"{name}.q_input_norm", h)
        yield tensor(f"{name}.softmax_scaling.scale", H)
        yield tensor(f"{name}.softmax_scaling.bias", H)
    if indexer.index_kpool is not None:
        yield tensor(f"{name}.index_kpool_compress_ape", indexer.index_kpool, D)
        yield tensor(f"{name}.index_kpool_compress_gate", D, h)


def _qk_norm(qk_norm: QKNorm, letter: str, heads: int, D: int) -> Iterator[Parameter]:
    name = f"self_attn.{letter}_norm"
    if qk_norm.width == "per-head":
        yield tensor(f"{name}.weight", heads, D, group="norm")
    elif qk_norm.width == "head-list":
        for i in range(heads):
            yield from norm_parameters(qk_norm.norm, f"{name}.norms.{i}", D)
    else:
        width = D if qk_norm.width == "head" else heads * D
        yield from norm_parameters(qk_norm.norm, name, width)


def _feed_forward(feed_forward: Dense | MoE | None, h: int) -> Iterator[Parameter]:
    match feed_forward:
        case Dense():
            yield from _dense(feed_forward, "mlp", h)
        case MoE(num_experts=E, moe_intermediate_size=i):
            yield from _router(feed_forward, h)
            if feed_forward.correction_bias:
                yield tensor("mlp.gate.e_score_correction_bias", 1, E, group="router")
            latent = feed_forward.latent_size
            if latent is not None:
                for name, out, into in (("fc1", latent, h), ("fc2", h, latent)):
                    yield from linear(
                        f"mlp.{name}_latent_proj",
                        "feed_forward",
                        out=out,
                        into=into,
                        bias=feed_forward.latent_bias,
                    )
            for part, size in _expert_shapes(feed_forward, E, i, latent or h).items():
                name = f"mlp.experts.{part}"
                turned = feed_forward.layout == "transposed" and len(size) == 3
                yield replace(tensor(name, *size, group="experts"), transposed=turned)
            if feed_forward.shared is not None:
                yield from _dense(feed_forward.shared, "mlp.shared_experts", h)
            if feed_forward.shared_gate:
                yield from linear("mlp.shared_expert_gate", "router", out=1, into=h, bias=False)
        case None:
            return
        case _:
            assert_never(feed_forward)


def _router(moe: MoE, h: int) -> Iterator[Parameter]:
    """A matrix of its own class in most families of transformers 5, no nn.Linear."""
    for p in linear("mlp.gate", "router", out=moe.num_experts, into=h, bias=moe.bias):
        yield p if moe.linear_router else replace(p, linear=False)


def _expert_shapes(moe: MoE, E: int, i: int, h: int) -> dict[str, tuple[int, ...]]:
    if moe.layout == "flat":
        return {part: (E * i, h) for part in ("gate_proj", "up_proj", "down_proj")}
    shapes: dict[str, tuple[int, ...]] = {}
    up = ("gate_up_proj", 2 * i, h) if moe.gated else ("up_proj", i, h)
    for part, out, into in (up, ("down_proj", h, i)):
        shapes[part] = (E, into, out) if moe.layout == "transposed" else (E, out, into)
        if moe.bias:
            shapes[f"{part}_bias"] = (E, out)
    return shapes


def _dense(dense: Dense, prefix: str, h: int) -> Iterator[Parameter]:
    i, bias = dense.intermediate_size, dense.bias
    if dense.fused_gate_up:
        ups = {"gate_up_proj": 2 * i}
    else:
        ups = {"gate_proj": i, "up_proj": i} if dense.gated else {"up_proj": i}
    for name, out in ups.items():
        yield from linear(f"{prefix}.{name}", "feed_forward", out=out, into=h, bias=bias)
    yield from linear(f"{prefix}.down_proj", "feed_forward", out=h, into=i, bias=bias)
