"""Readers of cohere, cohere2, glm, glm4, nemotron, exaone4, hunyuan_v1_dense and ministral.

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from planner.errors import ConfigError, shown
from planner.huggingface.blocks import (
    LLAMA_NAMES,
    causal_lm,
    gated,
    gqa,
    gqa_decoder,
    heads,
    layer_count,
    layer_windows,
    layernorm,
    plain,
    rmsnorm,
    rope,
)
from planner.huggingface.fields import Fields
from planner.layers import GQA, Layer, Norm, QKNorm
from planner.model import Model

GLM4_NAMES = (
    *LLAMA_NAMES,
    ("post_attention_layernorm", "post_self_attn_layernorm"),
    ("pre_feedforward_layernorm", "post_attention_layernorm"),
    ("post_feedforward_layernorm", "post_mlp_layernorm"),
)
HUNYUAN_NAMES = (
    *LLAMA_NAMES,
    ("self_attn.q_norm", "self_attn.query_layernorm"),
    ("self_attn.k_norm", "self_attn.key_layernorm"),
)


def stated_heads(
    fields: Fields, *, kv_heads: bool = True, head_dim: bool = True
) -> tuple[int, int, int]:
    """`heads` for classes that fail on a null: `kv_heads`, `head_dim` have to be numbers.

    A `head_dim` that the class does not know counts where the config has it, and is no null either.
    """
    if kv_heads:
        fields.size("num_key_value_heads")
    if head_dim or fields.has("head_dim"):
        fields.size("head_dim")
    return heads(fields)


def local_layers(
    fields: Fields, default: Callable[[int], bool], *, word: str = "sliding_attention"
) -> list[bool]:
    """Whether each layer is local: `layer_types` where the config has them, else `default(i)`."""
    L = layer_count(fields)
    types = fields.raw("layer_types")
    if types is None:
        return [default(i) for i in range(L)]
    if not isinstance(types, list) or len(types) != L:
        raise ConfigError(f"layer_types={shown(types)} is not allowed: a list of {L} words")
    for kind in types:
        if kind not in ("full_attention", word):
            raise ConfigError(f"layer_types has {shown(kind)}: one of full_attention, {word}")
    return [kind == word for kind in types]


def mixed_layers(layer: Layer, attentions: Sequence[GQA]) -> tuple[Layer, ...]:
    """One such layer for each attention; equal ones are the same object."""
    made = {a: replace(layer, attention=a) for a in attentions}
    return tuple(made[a] for a in attentions)


def read_cohere(fields: Fields) -> Model:
    """Command-R: attention and feed-forward in parallel, LayerNorm without bias, scaled logits.

    `use_qk_norm` (Command-R+): a scale for each head of its own.
    """
    H, G, D = stated_heads(fields, kv_heads=False, head_dim=False)
    norm, bias = layernorm(fields, bias=False), fields.flag("attention_bias")
    return gqa_decoder(
        fields,
        stem="Cohere",
        attention=gqa(
            (H, G, D),
            qkv_bias=bias,
            o_bias=bias,
            qk_norm=QKNorm(norm=norm, width="per-head") if fields.flag("use_qk_norm") else None,
        ),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=gated(fields),
        norm=norm,
        placement="parallel",
        positions=rope(fields, head_dim=D, interleaved=True),
        logit_scale=fields.number("logit_scale"),
    )


def read_cohere2(fields: Fields) -> Model:
    """Command-R7B: cohere's block; three of four layers slide, the others have no positions."""
    H, G, D = stated_heads(fields, kv_heads=False, head_dim=False)
    norm, bias = layernorm(fields, bias=False), fields.flag("attention_bias")
    window = fields.size("sliding_window")
    every = fields.size("sliding_window_pattern") if fields.has("sliding_window_pattern") else 4
    attention = gqa(
        (H, G, D),
        qkv_bias=bias,
        o_bias=bias,
    )
    kinds = (replace(attention, rope=False), replace(attention, sliding_window=window))
    local = local_layers(fields, lambda i: (i + 1) % every != 0)
    layer = Layer(attention=attention, feed_forward=gated(fields), norm=norm, placement="parallel")
    return causal_lm(
        fields,
        layers=mixed_layers(layer, [kinds[slides] for slides in local]),
        final_norm=norm,
        positions=rope(fields, head_dim=D, interleaved=True),
        base_class="Cohere2Model",
        head_class="Cohere2ForCausalLM",
        logit_scale=fields.number("logit_scale"),
        mask_windows=(None, window),
    )


def _glm_attention(fields: Fields) -> GQA:
    H, G, D = stated_heads(fields)
    return gqa(
        (H, G, D),
        qkv_bias=fields.flag("attention_bias"),
    )


def read_glm(fields: Fields) -> Model:
    """GLM-4-9B: q, k and v have biases, gate and up are one matrix, half of a head turns."""
    attention = _glm_attention(fields)
    return gqa_decoder(
        fields,
        stem="Glm",
        attention=attention,
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=gated(fields, fused=True),
        positions=rope(
            fields,
            head_dim=attention.head_dim,
            partial=True,
            partial_default=0.5,
            interleaved=True,
        ),
    )


def read_glm4(fields: Fields) -> Model:
    """GLM-4-0414: glm with norms on both sides of attention and feed-forward."""
    attention = _glm_attention(fields)
    return gqa_decoder(
        fields,
        stem="Glm4",
        attention=attention,
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=gated(fields, fused=True),
        placement="sandwich",
        positions=rope(
            fields,
            head_dim=attention.head_dim,
            partial=True,
            partial_default=0.5,
            interleaved=True,
        ),
        names=GLM4_NAMES,
    )


def read_nemotron(fields: Fields) -> Model:
    """Nemotron, Minitron: LayerNorm of 1 + weight, squared ReLU without a gate."""
    fields.size("num_key_value_heads")
    H, G, D = heads(fields)
    bias = fields.flag("attention_bias")
    return gqa_decoder(
        fields,
        stem="Nemotron",
        attention=gqa(
            (H, G, D),
            qkv_bias=bias,
            o_bias=bias,
        ),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=plain(fields, bias=fields.flag("mlp_bias")),
        norm=Norm(kind="layernorm", eps=fields.number("norm_eps"), bias=True, plus_one=True),
        positions=rope(fields, head_dim=D, partial=True, partial_default=0.5),
    )


def read_exaone4(fields: Fields) -> Model:
    """EXAONE 4: norms after each part, q and k normed, local layers by pattern or `layer_types`.

    With a window, full layers have no positions. The class cannot make `layer_types` from a string
    pattern, nor without a window.
    """
    H, G, D = stated_heads(fields, head_dim=False)
    norm, window = rmsnorm(fields), fields.optional_size("sliding_window")
    if fields.raw("layer_types") is None:
        every = fields.size("sliding_window_pattern")
        if window is None:
            raise ConfigError("sliding_window=None is not allowed without layer_types: a size")
        local = local_layers(fields, lambda i: (i + 1) % every != 0)
    else:
        local = local_layers(fields, lambda _: False)
        if window is None and any(local):
            raise ConfigError("sliding_window=None is not allowed: layer_types has sliding layers")
    attention = gqa(
        (H, G, D),
        qk_norm=QKNorm(norm=norm, width="head"),
    )
    kinds = (
        replace(attention, rope=window is None),
        replace(attention, sliding_window=window),
    )
    layer = Layer(attention=attention, feed_forward=gated(fields), norm=norm, placement="post")
    return causal_lm(
        fields,
        layers=mixed_layers(layer, [kinds[slides] for slides in local]),
        final_norm=norm,
        positions=rope(fields, head_dim=D),
        base_class="Exaone4Model",
        head_class="Exaone4ForCausalLM",
    )


def hunyuan_attention(fields: Fields) -> GQA:
    """Hunyuan's attention: q and k normed after they turned, biases by flag."""
    H, G, D = stated_heads(fields, kv_heads=False)
    bias = fields.flag("attention_bias")
    return gqa(
        (H, G, D),
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=QKNorm(norm=rmsnorm(fields), width="head", after_rope=True),
    )


def read_hunyuan_v1_dense(fields: Fields) -> Model:
    """Hunyuan: llama with norms on queries and keys; its class needs a `head_dim`."""
    return gqa_decoder(
        fields,
        stem="HunYuanDenseV1",
        attention=hunyuan_attention(fields),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=gated(fields),
        names=HUNYUAN_NAMES,
    )


def read_ministral(fields: Fields) -> Model:
    """Ministral: mistral with `layer_types`; its class needs a `head_dim` and a window."""
    H, G, D = stated_heads(fields)
    window = fields.size("sliding_window")
    local = local_layers(fields, lambda _: True)
    return gqa_decoder(
        fields,
        stem="Ministral",
        attention=gqa((H, G, D)),
        windows=[window if slides else None for slides in local],
        feed_forward=gated(fields),
        mask_windows=(None, window),
    )


READERS = {
    "cohere": read_cohere,
    "cohere2": read_cohere2,
    "exaone4": read_exaone4,
    "glm": read_glm,
    "glm4": read_glm4,
    "hunyuan_v1_dense": read_hunyuan_v1_dense,
    "ministral": read_ministral,
    "nemotron": read_nemotron,
}
