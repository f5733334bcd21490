"""The parameter table of a model: name, group, layer, shape of every trained tensor.

Shapes and names are those of the model's class in transformers (version in constraints.txt), so
that a row can be laid beside `named_parameters()`. Each module is listed once, under the llama
family's names; `Model.parameter_names` translates for families that use other words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal, assert_never

from planner.layers import GQA, MLA, Dense, Layer, MoE, Norm, Placement, QKNorm

Group = Literal["embedding", "attention", "feed_forward", "router", "experts", "norm", "head"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One trained tensor. `layer` is None outside the blocks."""

    name: str
    group: Group
    layer: int | None
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)


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
    return (
        *_attention(layer.attention, hidden_size),
        *_feed_forward(layer.feed_forward, hidden_size),
        *(
            p
            for name in NORMS[layer.placement]
            for p in norm_parameters(layer.norm, name, hidden_size)
        ),
    )


def norm_parameters(norm: Norm, name: str, width: int) -> Iterator[Parameter]:
    """The scale and the bias, as far as the norm has them."""
    if norm.weight:
        yield Parameter(name=f"{name}.weight", group="norm", layer=None, shape=(width,))
    if norm.bias:
        yield Parameter(name=f"{name}.bias", group="norm", layer=None, shape=(width,))


def _linear(name: str, group: Group, *, out: int, into: int, bias: bool) -> Iterator[Parameter]:
    yield Parameter(name=f"{name}.weight", group=group, layer=None, shape=(out, into))
    if bias:
        yield Parameter(name=f"{name}.bias", group=group, layer=None, shape=(out,))


def _attention(attention: GQA | MLA, h: int) -> Iterator[Parameter]:
    match attention:
        case GQA(num_attention_heads=H, num_key_value_heads=G, head_dim=D, qkv_bias=bias):
            outs = {"q": H * D, "k": G * D, "v": G * D}
            if attention.fused_qkv:
                outs = {"qkv": (H + 2 * G) * D}
            for letter, out in outs.items():
                name = f"self_attn.{letter}_proj"
                yield from _linear(name, "attention", out=out, into=h, bias=bias)
            yield from _linear(
                "self_attn.o_proj", "attention", out=h, into=H * D, bias=attention.o_bias
            )
            if attention.qk_norm is not None:
                for letter, heads in (("q", H), ("k", G)):
                    yield from _qk_norm(attention.qk_norm, letter, heads, D)
            if attention.sinks:
                yield Parameter(name="self_attn.sinks", group="attention", layer=None, shape=(H,))
        case MLA(num_attention_heads=H, q_lora_rank=d_q, kv_lora_rank=d_c, bias=bias):
            latent = Norm(kind="rmsnorm", eps=1e-6)
            D, D_rope, D_nope = (
                attention.qk_head_dim,
                attention.qk_rope_head_dim,
                attention.qk_nope_head_dim,
            )
            if d_q is None:
                yield from _linear("self_attn.q_proj", "attention", out=H * D, into=h, bias=False)
            else:
                yield from _linear("self_attn.q_a_proj", "attention", out=d_q, into=h, bias=bias)
                yield from norm_parameters(latent, "self_attn.q_a_layernorm", d_q)
                yield from _linear(
                    "self_attn.q_b_proj", "attention", out=H * D, into=d_q, bias=False
                )
            yield from _linear(
                "self_attn.kv_a_proj_with_mqa", "attention", out=d_c + D_rope, into=h, bias=bias
            )
            yield from norm_parameters(latent, "self_attn.kv_a_layernorm", d_c)
            up = H * (D_nope + attention.v_head_dim)
            yield from _linear("self_attn.kv_b_proj", "attention", out=up, into=d_c, bias=False)
            yield from _linear(
                "self_attn.o_proj", "attention", out=h, into=H * attention.v_head_dim, bias=bias
            )
        case _:
            assert_never(attention)


def _qk_norm(qk_norm: QKNorm, letter: str, heads: int, D: int) -> Iterator[Parameter]:
    name = f"self_attn.{letter}_norm"
    if qk_norm.width == "per-head":
        yield Parameter(name=f"{name}.weight", group="norm", layer=None, shape=(heads, D))
    elif qk_norm.width == "head-list":
        for i in range(heads):
            yield from norm_parameters(qk_norm.norm, f"{name}.norms.{i}", D)
    else:
        width = D if qk_norm.width == "head" else heads * D
        yield from norm_parameters(qk_norm.norm, name, width)


def _feed_forward(feed_forward: Dense | MoE, h: int) -> Iterator[Parameter]:
    match feed_forward:
        case Dense():
            yield from _dense(feed_forward, "mlp", h)
        case MoE(num_experts=E, moe_intermediate_size=i):
            yield from _linear("mlp.gate", "router", out=E, into=h, bias=feed_forward.bias)
            if feed_forward.correction_bias:
                yield Parameter(
                    name="mlp.gate.e_score_correction_bias",
                    group="router",
                    layer=None,
                    shape=(1, E),
                )
            for part, size in _expert_shapes(feed_forward, E, i, h).items():
                name = f"mlp.experts.{part}"
                yield Parameter(name=name, group="experts", layer=None, shape=size)
            if feed_forward.shared is not None:
                yield from _dense(feed_forward.shared, "mlp.shared_experts", h)
            if feed_forward.shared_gate:
                yield from _linear("mlp.shared_expert_gate", "router", out=1, into=h, bias=False)
        case _:
            assert_never(feed_forward)


def _expert_shapes(moe: MoE, E: int, i: int, h: int) -> dict[str, tuple[int, ...]]:
    if moe.layout == "flat":
        return {part: (E * i, h) for part in ("gate_proj", "up_proj", "down_proj")}
    shapes: dict[str, tuple[int, ...]] = {}
    for part, out, into in (("gate_up_proj", 2 * i, h), ("down_proj", h, i)):
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
        yield from _linear(f"{prefix}.{name}", "feed_forward", out=out, into=h, bias=bias)
    yield from _linear(f"{prefix}.down_proj", "feed_forward", out=h, into=i, bias=bias)
