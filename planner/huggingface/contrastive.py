"""Readers of clip and siglip: an encoder of text and one of images, compared by their outputs.

Text is the main stack, images stand beside it (transformers 5.23, models/clip/, models/siglip/).
"""

from __future__ import annotations

from typing import Any

from planner.errors import ConfigError, shown
from planner.huggingface.blocks import about, chosen_head, layernorm, plain
from planner.huggingface.fields import Fields
from planner.huggingface.towers import (
    CLIP_LIKE,
    classifier,
    conv,
    head_linear,
    image_model,
    inside,
    norm_tensors,
    own_attention,
    patch_count,
    rooted,
    same_blocks,
    square,
)
from planner.huggingface.wrapper import named, part
from planner.layers import Layer, LearnedPositions
from planner.model import Model, Tower
from planner.tensors import Parameter, tensor

TEXT_NAMES = (
    *CLIP_LIKE,
    ("embed_tokens", "embeddings.token_embedding"),
    ("embed_positions", "embeddings.position_embedding"),
    ("norm", "final_layer_norm"),
)


def _blocks(fields: Fields) -> tuple[Layer, ...]:
    return same_blocks(
        fields,
        attention=own_attention(fields, qkv_bias=True, o_bias=True),
        feed_forward=plain(fields),
        norm=layernorm(fields),
    )


def _patches(fields: Fields, *, more: int, bias: bool) -> list[Parameter]:
    """The convolution and a row for each patch and `more`."""
    rows = _rows(fields, more=more)
    h, C, p = (fields.size(n) for n in ("hidden_size", "num_channels", "patch_size"))
    return [
        *conv("embeddings.patch_embedding", h, C, p, p, bias=bias),
        tensor("embeddings.position_embedding.weight", rows, h, group="embedding"),
    ]


def _rows(fields: Fields, *, more: int) -> int:
    """Positions, which the classes keep numbered in int64 too."""
    image, p = square(fields, "image_size"), square(fields, "patch_size")
    return patch_count((image, image), (p, p)) + more


def clip_vision(fields: Fields) -> Tower:
    """CLIP's ViT: a class token, a norm before the blocks (whose name has a slip) and one after."""
    norm, h = layernorm(fields), fields.size("hidden_size")
    return Tower(
        part="vision",
        hidden_size=h,
        layers=_blocks(fields),
        outer=(
            tensor("embeddings.class_embedding", h, group="embedding"),
            *_patches(fields, more=1, bias=False),
            *norm_tensors(norm, "pre_layrnorm", h),
            *norm_tensors(norm, "post_layernorm", h),
        ),
        parameter_names=CLIP_LIKE,
        buffer_bytes=8 * _rows(fields, more=1),
    )


def siglip_vision(fields: Fields) -> Tower:
    """SigLIP's ViT: no class token; `vision_use_head` pools with an attention of one query."""
    norm, h = layernorm(fields), fields.size("hidden_size")
    outer = [*_patches(fields, more=0, bias=True), *norm_tensors(norm, "post_layernorm", h)]
    if fields.flag("vision_use_head"):
        i = fields.size("intermediate_size")
        outer += [
            tensor("head.probe", 1, 1, h),
            tensor("head.attention.in_proj_weight", 3 * h, h),
            tensor("head.attention.in_proj_bias", 3 * h),
            *head_linear("head.attention.out_proj", out=h, into=h),
            *norm_tensors(norm, "head.layernorm", h),
            *head_linear("head.mlp.fc1", out=i, into=h),
            *head_linear("head.mlp.fc2", out=h, into=i),
        ]
    return Tower(
        part="vision",
        hidden_size=h,
        layers=_blocks(fields),
        outer=tuple(outer),
        parameter_names=CLIP_LIKE,
        buffer_bytes=8 * _rows(fields, more=0),
    )


def _text_encoder(fields: Fields) -> dict[str, Any]:
    """What the encoder of text fills in of the Model whose main stack it is."""
    return {
        "hidden_size": fields.size("hidden_size"),
        "vocab_size": fields.size("vocab_size"),
        "max_position_embeddings": fields.size("max_position_embeddings"),
        "layers": _blocks(fields),
        "final_norm": layernorm(fields),
        "positions": LearnedPositions(),
        "tie_word_embeddings": False,
        "lm_head": False,
        "is_decoder": False,
        "text_type": fields.model_type,
    }


def _projector(*parameters: Parameter) -> Tower:
    return Tower(part="projector", outer=parameters)


def _projection(fields: Fields, name: str, *, into: int) -> tuple[Parameter, ...]:
    return head_linear(name, out=fields.size("projection_dim"), into=into, bias=False)


def read_clip(fields: Fields) -> Model:
    """CLIP (arXiv:2103.00020): both encoders, a projection behind each, one scale.

    An old `text_config_dict` replaces all of `text_config`, and so for vision.
    """
    head = chosen_head(fields, "CLIPModel", "CLIPForImageClassification")
    text = _clip_part(fields, "text_config", "clip_text_model")
    vision = _clip_part(fields, "vision_config", "clip_vision_model")
    with named("vision_config"):
        tower = inside(clip_vision(vision), "vision_model")
    if head != "CLIPModel":
        return image_model(fields, tower, *classifier(fields, into=tower.hidden_size))
    scale = fields.raw("logit_scale_init_value")
    if not isinstance(scale, float):  # it becomes a trained tensor of that type
        raise ConfigError(f"logit_scale_init_value={shown(scale)} is not allowed: a float")
    with named("text_config"):
        encoder = _text_encoder(text)
    projector = _projector(
        *_projection(fields, "visual_projection", into=tower.hidden_size),
        *_projection(fields, "text_projection", into=encoder["hidden_size"]),
    )
    return Model(
        **encoder,
        towers=(tower, projector),
        extra_parameters=(tensor("logit_scale", group="head"),),
        parameter_names=rooted(TEXT_NAMES, "text_model"),
        **about(fields),
    )


def _clip_part(fields: Fields, name: str, model_type: str) -> Fields:
    old = f"{name}_dict"
    return part(fields, old if fields.config.get(old) is not None else name, model_type, only=True)


def read_clip_text_model(fields: Fields) -> Model:
    """CLIP's encoder of text alone, with or without its projection."""
    head = chosen_head(fields, "CLIPTextModel", "CLIPTextModelWithProjection")
    encoder = _text_encoder(fields)
    if head == "CLIPTextModel":
        return Model(**encoder, parameter_names=TEXT_NAMES, **about(fields))
    projection = _projection(fields, "text_projection", into=encoder["hidden_size"])
    return Model(
        **encoder,
        towers=(_projector(*projection),),
        parameter_names=rooted(TEXT_NAMES, "text_model"),
        **about(fields),
    )


def read_clip_vision_model(fields: Fields) -> Model:
    """CLIP's encoder of images alone, with or without its projection."""
    head = chosen_head(fields, "CLIPVisionModel", "CLIPVisionModelWithProjection")
    tower = clip_vision(fields)
    if head == "CLIPVisionModel":
        return image_model(fields, tower)
    projection = _projection(fields, "visual_projection", into=tower.hidden_size)
    return image_model(fields, inside(tower, "vision_model"), *projection)


def read_siglip(fields: Fields) -> Model:
    """SigLIP (arXiv:2303.15343): both encoders with heads of their own, one scale and one bias."""
    head = chosen_head(fields, "SiglipModel", "SiglipForImageClassification")
    text = part(fields, "text_config", "siglip_text_model", only=True)
    vision = part(fields, "vision_config", "siglip_vision_model", only=True)
    with named("vision_config"):
        tower = inside(siglip_vision(vision), "vision_model")
    if head != "SiglipModel":
        return image_model(fields, tower, *classifier(fields, into=tower.hidden_size))
    with named("text_config"):
        encoder = _text_encoder(text)
        projector = inside(_projector(*_siglip_head(text)), "text_model")
    names = ("logit_scale", "logit_bias")
    return Model(
        **encoder,
        towers=(tower, projector),
        extra_parameters=tuple(tensor(name, 1, group="head") for name in names),
        parameter_names=rooted(TEXT_NAMES, "text_model"),
        **about(fields),
    )


def _siglip_head(text: Fields) -> tuple[Parameter, ...]:
    """From the last token's state to `projection_size`; null: as wide as the encoder."""
    h = text.size("hidden_size")
    return head_linear("head", out=text.optional_size("projection_size") or h, into=h)


def read_siglip_text_model(fields: Fields) -> Model:
    """SigLIP's encoder of text alone."""
    chosen_head(fields, "SiglipTextModel")
    encoder, projector = _text_encoder(fields), _projector(*_siglip_head(fields))
    return Model(**encoder, towers=(projector,), parameter_names=TEXT_NAMES, **about(fields))


def read_siglip_vision_model(fields: Fields) -> Model:
    """SigLIP's encoder of images alone."""
    chosen_head(fields, "SiglipVisionModel")
    return image_model(fields, siglip_vision(fields))


READERS = {
    "clip": read_clip,
    "clip_text_model": read_clip_text_model,
    "clip_vision_model": read_clip_vision_model,
    "siglip": read_siglip,
    "siglip_text_model": read_siglip_text_model,
    "siglip_vision_model": read_siglip_vision_model,
}
