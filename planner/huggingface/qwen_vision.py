"""Encoders of images and video of Qwen-VL (transformers 5.23, models/qwen2_vl/ and later).

Patches of several frames go through a convolution; at the end neighbours are merged and projected.
The windows of qwen2.5's attention are a matter of images alone and not described.
"""

from __future__ import annotations

from planner.errors import ConfigError, shown
from planner.huggingface.blocks import chosen_head, gated, plain
from planner.huggingface.fields import Fields
from planner.huggingface.rotary_vision import axial_positions
from planner.huggingface.towers import (
    conv,
    head_linear,
    image_model,
    norm_tensors,
    own_attention,
    same_blocks,
    square,
)
from planner.layers import Dense, Norm
from planner.model import Model, Tower
from planner.tensors import Parameter, tensor

NAMES = (
    ("layers", "blocks"),
    ("self_attn.qkv_proj", "attn.qkv"),
    ("self_attn.o_proj", "attn.proj"),
    ("input_layernorm", "norm1"),
    ("post_attention_layernorm", "norm2"),
)
NAMES_2 = (*NAMES, ("mlp.up_proj", "mlp.fc1"), ("mlp.down_proj", "mlp.fc2"))
NAMES_3 = (*NAMES, ("mlp.up_proj", "mlp.linear_fc1"), ("mlp.down_proj", "mlp.linear_fc2"))
RMSNORM = Norm(kind="rmsnorm", eps=1e-6)
LAYERNORM = Norm(kind="layernorm", eps=1e-6, bias=True)


def _tower(
    fields: Fields,
    *outer: Parameter,
    feed_forward: Dense,
    norm: Norm,
    names: tuple[tuple[str, str], ...],
    patch_bias: bool = False,
    width: str = "hidden_size",
) -> Tower:
    axial_positions(fields)
    h, p, frames = fields.size(width), square(fields, "patch_size"), "temporal_patch_size"
    size = (h, fields.size("in_channels"), square(fields, frames), p, p)
    attention = own_attention(fields, width=width, fused_qkv=True, qkv_bias=True, o_bias=True)
    D = fields.optional_size("head_dim") or attention.head_dim  # only the positions go by it
    return Tower(
        part="vision",
        hidden_size=h,
        layers=same_blocks(fields, attention=attention, feed_forward=feed_forward, norm=norm),
        outer=(*conv("patch_embed.proj", *size, bias=patch_bias), *outer),
        parameter_names=names,
        buffer_bytes=8 * -(-D // 4),  # frequencies of rows and columns, twice
    )


def _merged(fields: Fields, width: int) -> int:
    """Width of the patches that are merged into one."""
    return width * fields.size("spatial_merge_size") ** 2


def _merger(fields: Fields, *, norm: Norm, width: int, out: int) -> tuple[Parameter, ...]:
    merged = _merged(fields, width)
    return (
        *norm_tensors(norm, "merger.ln_q", width),
        *head_linear("merger.mlp.0", out=merged, into=merged),
        *head_linear("merger.mlp.2", out=out, into=merged),
    )


def qwen2_vision(fields: Fields) -> Tower:
    """Qwen2-VL's (arXiv:2409.12191): `embed_dim` wide; `hidden_size` is that of the text."""
    h = fields.size("embed_dim")
    merger = _merger(fields, norm=LAYERNORM, width=h, out=fields.size("hidden_size"))
    return _tower(
        fields,
        *merger,
        feed_forward=plain(fields, intermediate_size=h * fields.size("mlp_ratio")),
        norm=LAYERNORM,
        names=NAMES_2,
        width="embed_dim",
    )


def qwen2_5_vision(fields: Fields) -> Tower:
    """Qwen2.5-VL's (arXiv:2502.13923): blocks like a llama's, with biases."""
    out = fields.size("out_hidden_size")
    merger = _merger(fields, norm=RMSNORM, width=fields.size("hidden_size"), out=out)
    return _tower(fields, *merger, feed_forward=gated(fields, bias=True), norm=RMSNORM, names=NAMES)


def qwen3_vision(fields: Fields) -> Tower:
    """Qwen3-VL's (arXiv:2511.21631): learned positions, a merger for each level of DeepStack."""
    levels = fields.raw("deepstack_visual_indexes")
    if not isinstance(levels, list) or any(type(index) is not int for index in levels):
        raise ConfigError(
            f"deepstack_visual_indexes={shown(levels)} is not allowed: a list of layer numbers"
        )
    h, rows = fields.size("hidden_size"), fields.size("num_position_embeddings")
    mergers = [_merger_3(fields, "merger", normed=h)]
    mergers += [
        _merger_3(fields, f"deepstack_merger_list.{i}", normed=_merged(fields, h))
        for i in range(len(levels))
    ]
    return _tower(
        fields,
        tensor("pos_embed.weight", rows, h, group="embedding"),
        *(p for merger in mergers for p in merger),
        feed_forward=plain(fields),
        norm=LAYERNORM,
        names=NAMES_3,
        patch_bias=True,
    )


def _merger_3(fields: Fields, name: str, *, normed: int) -> tuple[Parameter, ...]:
    merged = _merged(fields, fields.size("hidden_size"))
    return (
        *norm_tensors(LAYERNORM, f"{name}.norm", normed),
        *head_linear(f"{name}.linear_fc1", out=merged, into=merged),
        *head_linear(f"{name}.linear_fc2", out=fields.size("out_hidden_size"), into=merged),
    )


def read_qwen2_5_vl_vision(fields: Fields) -> Model:
    """Qwen2.5-VL's encoder of images alone."""
    chosen_head(fields, "Qwen2_5_VisionTransformerPretrainedModel")
    return image_model(fields, qwen2_5_vision(fields))


def read_qwen3_vl_vision(fields: Fields) -> Model:
    """Qwen3-VL's encoder of images alone."""
    chosen_head(fields, "Qwen3VLVisionModel")
    return image_model(fields, qwen3_vision(fields))


def read_qwen3_vl_moe_vision(fields: Fields) -> Model:
    """The same beside a mixture."""
    chosen_head(fields, "Qwen3VLMoeVisionModel")
    return image_model(fields, qwen3_vision(fields))


READERS = {
    "qwen2_5_vl_vision": read_qwen2_5_vl_vision,
    "qwen3_vl_moe_vision": read_qwen3_vl_moe_vision,
    "qwen3_vl_vision": read_qwen3_vl_vision,
}
