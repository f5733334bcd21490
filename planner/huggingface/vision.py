"""Readers of vit and dinov2 (transformers 5.23): an encoder of images, a classifier on it."""

from __future__ import annotations

from dataclasses import replace

from planner.ends import Ends, Patches, Step
from planner.errors import check_choice, check_size
from planner.huggingface.blocks import activation, chosen_head, layernorm, plain
from planner.huggingface.fields import Fields
from planner.huggingface.towers import (
    classifier,
    conv,
    head_linear,
    image_model,
    inside,
    norm_tensors,
    own_attention,
    patch_count,
    same_blocks,
    sides,
)
from planner.layers import ACTIVATIONS, GQA, Dense
from planner.model import Model, Tower
from planner.tensors import Parameter, tensor

VIT_NAMES = (
    ("layers", "layers"),
    ("self_attn", "attention"),
    ("input_layernorm", "layernorm_before"),
    ("post_attention_layernorm", "layernorm_after"),
    ("mlp.up_proj", "mlp.fc1"),
    ("mlp.down_proj", "mlp.fc2"),
)
DINO_NAMES = (
    ("layers", "encoder.layer"),
    ("self_attn", "attention"),
    ("input_layernorm", "norm1"),
    ("post_attention_layernorm", "norm2"),
)
DINO_PLAIN_NAMES = (*DINO_NAMES, ("mlp.up_proj", "mlp.fc1"), ("mlp.down_proj", "mlp.fc2"))


def _attention(fields: Fields) -> GQA:
    """A stray `head_dim` widens the projections: the classes take any attribute of that name."""
    bias = fields.flag("qkv_bias")
    attention = own_attention(fields, exact=False, qkv_bias=bias, o_bias=True)
    if not fields.has("head_dim"):
        return attention
    H, D = attention.num_attention_heads, fields.size("head_dim")
    return GQA(
        num_attention_heads=H,
        num_key_value_heads=H,
        head_dim=D,
        scaling=D**-0.5,
        qkv_bias=bias,
        o_bias=True,
    )


def _embeddings(fields: Fields) -> list[Parameter]:
    """A class token, a row for each patch and that token, the patches' convolution."""
    h, C = fields.size("hidden_size"), fields.size("num_channels")
    image, patch = sides(fields, "image_size"), sides(fields, "patch_size")
    rows = patch_count(image, patch) + 1
    return [
        tensor("embeddings.cls_token", 1, 1, h, group="embedding"),
        tensor("embeddings.position_embeddings", 1, rows, h, group="embedding"),
        *conv("embeddings.patch_embeddings.projection", h, C, *patch, bias=True),
    ]


def _patches(fields: Fields, root: str) -> Patches:
    """How `_embeddings` are used, in the module `root`."""
    return Patches(
        image_size=sides(fields, "image_size"),
        projection=f"{root}embeddings.patch_embeddings.projection",
        class_token=f"{root}embeddings.cls_token",
        positions=f"{root}embeddings.position_embeddings",
    )


def read_vit(fields: Fields) -> Model:
    """ViT (arXiv:2010.11929): the bare model has a pooler, its heads have none."""
    heads = ("ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling")
    head, norm, h = chosen_head(fields, *heads), layernorm(fields), fields.size("hidden_size")
    feed_forward, root = plain(fields), "" if head == "ViTModel" else "vit."
    ends = Ends(patches=_patches(fields, root), final_norm=(f"{root}layernorm", norm))
    tower = Tower(
        part="vision",
        hidden_size=h,
        layers=same_blocks(
            fields, attention=_attention(fields), feed_forward=feed_forward, norm=norm
        ),
        outer=(*_embeddings(fields), *norm_tensors(norm, "layernorm", h)),
        parameter_names=VIT_NAMES,
    )
    if head == "ViTModel":
        out = fields.optional_size("pooler_output_size", minimum=0) or h
        act = check_choice("pooler_act", fields.raw("pooler_act"), ("tanh", *ACTIVATIONS))
        pooler = Step(name="pooler.dense", activation=act)  # type: ignore[arg-type]
        ends = replace(ends, pooler=pooler)
        return image_model(fields, tower, *head_linear("pooler.dense", out=out, into=h), ends=ends)
    tower = inside(tower, "vit")
    if head == "ViTForImageClassification":
        labels = classifier(fields, into=h)
        ends = replace(ends, reads="first", steps=(Step(name="classifier"),) if labels else ())
        return image_model(fields, tower, *labels, ends=ends)
    pixels = fields.size("encoder_stride") ** 2 * fields.size("num_channels")
    return image_model(
        fields,
        tower,
        tensor("vit.embeddings.mask_token", 1, 1, h, group="embedding"),
        tensor("decoder.0.weight", pixels, h, 1, 1, group="head"),
        tensor("decoder.0.bias", pixels, group="head"),
        ends=ends,
    )


def read_dinov2(fields: Fields) -> Model:
    """DINOv2 (arXiv:2304.07193): scales on what a block adds; the giant has a gated feed-forward.

    The classifier reads the class token and the mean of the patches.
    """
    heads = ("Dinov2Model", "Dinov2ForImageClassification", "Dinov2Backbone")
    head, norm, h = chosen_head(fields, *heads), layernorm(fields), fields.size("hidden_size")
    feed_forward = _dino_feed_forward(fields)
    scales = [tensor(f"layer_scale{i}.lambda1", h, group="norm") for i in (1, 2)]
    outer = [*_embeddings(fields), *norm_tensors(norm, "layernorm", h)]
    if fields.flag("use_mask_token"):
        outer.append(tensor("embeddings.mask_token", 1, h, group="embedding"))
    tower = Tower(
        part="vision",
        hidden_size=h,
        layers=same_blocks(
            fields,
            attention=_attention(fields),
            feed_forward=feed_forward,
            norm=norm,
            extra=scales,
        ),
        outer=tuple(outer),
        parameter_names=DINO_NAMES if feed_forward.gated else DINO_PLAIN_NAMES,
    )
    if head == "Dinov2ForImageClassification":
        return image_model(fields, inside(tower, "dinov2"), *classifier(fields, into=2 * h))
    return image_model(fields, tower)


def _dino_feed_forward(fields: Fields) -> Dense:
    """`mlp_ratio` times as wide; gated: two thirds of that, rounded up to a multiple of 8."""
    width = check_size("mlp_ratio", fields.raw("mlp_ratio")) * fields.size("hidden_size")
    if not fields.flag("use_swiglu_ffn"):
        act = activation(fields)
        return Dense(intermediate_size=width, activation=act, gated=False, bias=True)
    width = (int(width * 2 / 3) + 7) // 8 * 8
    return Dense(intermediate_size=width, activation="silu", gated=True, bias=True)


READERS = {
    "dinov2": read_dinov2,
    "vit": read_vit,
}
