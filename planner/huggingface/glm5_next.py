"""Readers of glm5_next and its text model (transformers 5.23, models/glm5_next/)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from planner.errors import ConfigError, shown
from planner.huggingface.blocks import causal_lm, gated, layer_count, rmsnorm
from planner.huggingface.deepseek_v4 import hyper_connection
from planner.huggingface.fields import Fields
from planner.huggingface.rotary_vision import axial_positions
from planner.huggingface.sparse_latent import (
    INDEXED,
    grouped_mixture,
    indexed_layers,
    indexer,
    layer_words,
)
from planner.huggingface.wrapped import TEXT_NAMES, Names, part, text_fields, wrapped
from planner.layers import GQA, MLA, Layer, NoPositions, Norm, QKNorm
from planner.mixers.linear import KimiDelta
from planner.model import Model, Tower
from planner.parameters import norm_parameters
from planner.tensors import linear, tensor

LINEAR = ("linear_attention", "mamba")
LINEAR_FIELDS = {
    "linear_head_dim": "head_dim",
    "linear_num_heads": "num_heads",
    "linear_conv_kernel_dim": "short_conv_kernel_size",
}
"""The fields of linear attention, and their names in the older `linear_attn_config`."""

WRAPPER_FIELDS = (
    "architectures",
    "dtype",
    "image_end_token_id",
    "image_start_token_id",
    "image_token_id",
    "model_type",
    "text_config",
    "tie_word_embeddings",
    "torch_dtype",
    "video_end_token_id",
    "video_start_token_id",
    "video_token_id",
    "vision_config",
)


def read_glm5_next_text(fields: Fields) -> Model:
    """The text model of GLM-5-Next alone; its class has no language-model head."""
    bare = "Glm5NextTextModel"
    return replace(_text(fields, base_class=bare, head_class=bare, names=()), lm_head=False)


def read_glm5_next(fields: Fields) -> Model:
    """GLM-5-Next: text and a vision tower; a config without `text_config` is the text's own."""
    given = part(fields, "text_config")
    if given is None:
        given = {k: v for k, v in fields.config.items() if k not in WRAPPER_FIELDS}
    inner = text_fields(fields, given, "glm5_next_text")
    vision = Fields(part(fields, "vision_config") or {}, "glm5_next_vision")
    text = _text(
        inner,
        base_class="Glm5NextModel",
        head_class="Glm5NextForConditionalGeneration",
        names=TEXT_NAMES,
    )
    return wrapped(fields, text, towers=(_vision_tower(vision),), others=(vision,))


def _text(fields: Fields, *, base_class: str, head_class: str, names: Names) -> Model:
    """Three layers of linear attention, then one of latent attention to an indexer's picks.

    No positions; hyper-connections between the layers; the indexer's keys are pooled.
    """
    fields.spell(n_routed_experts=("num_local_experts", "n_routed_experts"))
    H = fields.size("num_attention_heads")
    G = fields.size("num_key_value_heads")
    if G != H:
        raise ConfigError(f"num_key_value_heads={G} is not allowed: num_attention_heads={H}")
    mixers = _mixers(fields)
    mixture, dense, norm = grouped_mixture(fields), gated(fields), rmsnorm(fields)
    streams, h = fields.size("hc_mult"), fields.size("hidden_size")
    kinds = layer_words(fields, "mlp_layer_types", ("dense", "sparse"))
    if kinds is None:
        kinds = ["dense" if i < 3 else "sparse" for i in range(len(mixers))]
    keys = list(zip(mixers, kinds, strict=True))
    made = {
        (mixer, kind): Layer(
            attention=mixer,
            feed_forward=mixture if kind == "sparse" else dense,
            norm=norm,
            extra_parameters=(
                *hyper_connection("attn_hc", "attention", streams, h),
                *hyper_connection("ffn_hc", "feed_forward", streams, h),
            ),
        )
        for mixer, kind in set(keys)
    }
    return causal_lm(
        fields,
        layers=tuple(made[key] for key in keys),
        final_norm=norm,
        positions=NoPositions(),
        names=names,
        base_class=base_class,
        head_class=head_class,
    )


def _mixers(fields: Fields) -> list[MLA | KimiDelta]:
    L = layer_count(fields)
    kinds = layer_words(fields, "layer_types", (*LINEAR, "full_attention", *INDEXED))
    if kinds is None:
        kinds = ["indexed_attention" if i % 4 == 3 else "linear_attention" for i in range(L)]
    latent = [kind not in LINEAR for kind in kinds]
    own = indexed_layers(fields, first_is_full=False)
    for i in range(L):
        if latent[i] and not own[i] and not (i and latent[i - 1] and own[i - 1]):
            raise ConfigError(
                f"indexer_types[{i}]='shared' is not allowed: the layer before it has no indexer"
            )
    linear_attention = KimiDelta(**_linear_sizes(fields), flat_decay=True)
    with_indexer, without = (_latent(fields, indexed=indexed) for indexed in (True, False))
    return [
        (with_indexer if own[i] else without) if latent[i] else linear_attention for i in range(L)
    ]


def _linear_sizes(fields: Fields) -> dict[str, Any]:
    older = fields.config.get("linear_attn_config")
    if older is not None and not isinstance(older, Mapping):
        raise ConfigError(f"linear_attn_config={shown(older)} is not allowed: an object or null")
    config: dict[str, Any] = {**fields.config}
    for name, theirs in LINEAR_FIELDS.items():
        if older is not None and theirs in older:
            config[name] = older[theirs]
    inner = Fields(config, fields.model_type)
    return {name: inner.size(name) for name in LINEAR_FIELDS}


def _latent(fields: Fields, *, indexed: bool) -> MLA:
    if fields.size("qk_rope_head_dim", minimum=0):
        raise ConfigError(
            f"qk_rope_head_dim={fields.size('qk_rope_head_dim')} is not allowed: 0, no positions"
        )
    D = fields.size("qk_nope_head_dim")
    return MLA(
        num_attention_heads=fields.size("num_attention_heads"),
        q_lora_rank=fields.size("q_lora_rank"),
        kv_lora_rank=fields.size("kv_lora_rank"),
        qk_nope_head_dim=D,
        qk_rope_head_dim=0,
        v_head_dim=fields.size("v_head_dim"),
        scaling=D**-0.5,
        bias=fields.flag("attention_bias"),
        indexer=indexer(fields, rotary_dim=0, pool=fields.size("index_kpool")) if indexed else None,
    )


def _vision_tower(fields: Fields) -> Tower:
    """Patches of two frames, blocks with norms on q and k, 2 · 2 patches merged into one token."""
    fields.spell(
        depth=("num_hidden_layers", "depth"), num_heads=("num_attention_heads", "num_heads")
    )
    h, H = fields.size("hidden_size"), fields.size("num_heads")
    if h % H or h // H % 4:
        raise ConfigError(f"hidden_size={h} is not num_heads={H} times a multiple of 4")
    axial_positions(fields)
    bias, norm = fields.flag("attention_bias"), rmsnorm(fields)
    attention = GQA(
        num_attention_heads=H,
        num_key_value_heads=H,
        head_dim=h // H,
        scaling=(h // H) ** -0.5,
        qkv_bias=bias,
        o_bias=bias,
        fused_qkv=True,
        qk_norm=QKNorm(norm=norm, width="head"),
    )
    feed_forward = gated(fields, bias=bias)
    out, wide = fields.size("out_hidden_size"), fields.size("projection_intermediate_size")
    p, t, m = (
        fields.size(name) for name in ("patch_size", "temporal_patch_size", "spatial_merge_size")
    )
    name = "model.visual"
    layernorm = Norm(kind="layernorm", eps=1e-5, bias=True)
    merger: list[tuple[str, int, int]] = [
        ("proj", out, out),
        ("gate_proj", wide, out),
        ("up_proj", wide, out),
        ("down_proj", out, wide),
    ]
    return Tower(
        part="vision",
        hidden_size=h,
        layers=(Layer(attention=attention, feed_forward=feed_forward, norm=norm),)
        * fields.size("depth", minimum=0),
        outer=(
            tensor(f"{name}.patch_embed.proj.weight", h, fields.size("in_channels"), t, p, p),
            tensor(f"{name}.patch_embed.proj.bias", h),
            tensor(f"{name}.post_layernorm.weight", h),
            tensor(f"{name}.downsample.weight", out, h, m, m),
            tensor(f"{name}.downsample.bias", out),
            *(
                p
                for part, rows, columns in merger
                for p in linear(
                    f"{name}.merger.{part}", "vision", out=rows, into=columns, bias=False
                )
            ),
            *norm_parameters(layernorm, f"{name}.merger.post_projection_norm", out),
        ),
        parameter_names=(
            ("self_attn.qkv_proj", "attn.qkv"),
            ("self_attn.o_proj", "attn.proj"),
            ("self_attn", "attn"),
            ("input_layernorm", "norm1"),
            ("post_attention_layernorm", "norm2"),
            ("layers", f"{name}.blocks"),
        ),
    )


READERS: dict[str, Callable[[Fields], Model]] = {
    "glm5_next": read_glm5_next,
    "glm5_next_text": read_glm5_next_text,
}
