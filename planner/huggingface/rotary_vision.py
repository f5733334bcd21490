"""Encoders of images with rotary positions: pixtral's and llama4's (transformers 5.23)."""

from __future__ import annotations

from planner.errors import ConfigError, shown
from planner.huggingface.blocks import activation, chosen_head, gated
from planner.huggingface.fields import Fields
from planner.huggingface.towers import (
    conv,
    head_linear,
    image_model,
    norm_tensors,
    own_attention,
    patch_count,
    same_blocks,
    sides,
    square,
)
from planner.layers import Dense, Norm
from planner.model import Model, Tower
from planner.tensors import tensor

PIXTRAL_NAMES = (
    ("layers", "transformer.layers"),
    ("self_attn", "attention"),
    ("mlp", "feed_forward"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"),
)
LLAMA4_VISION_NAMES = (
    ("layers", "model.layers"),
    ("mlp.up_proj", "mlp.fc1"),
    ("mlp.down_proj", "mlp.fc2"),
)


def axial_positions(fields: Fields) -> None:
    """ConfigError for rotary positions other than those of rows and columns."""
    kind = fields.rope_parameters()["rope_type"]
    if kind not in ("axial", "default"):
        raise ConfigError(f"rope_type={shown(kind)} is not allowed: one of axial, default")


def pixtral(fields: Fields) -> Tower:
    """Pixtral (arXiv:2410.07073): images of any size, blocks like a llama's, one norm before."""
    axial_positions(fields)
    norm = Norm(kind="rmsnorm", eps=1e-5)
    h, C, attention = fields.size("hidden_size"), fields.size("num_channels"), own_attention(fields)
    D = fields.optional_size("head_dim") or attention.head_dim  # only the positions go by it
    return Tower(
        part="vision",
        hidden_size=h,
        layers=same_blocks(fields, attention=attention, feed_forward=gated(fields), norm=norm),
        outer=(
            *conv("patch_conv", h, C, *sides(fields, "patch_size"), bias=False),
            *norm_tensors(norm, "ln_pre", h),
        ),
        parameter_names=PIXTRAL_NAMES,
        buffer_bytes=8 * -(-D // 2),  # D / 2 frequencies, twice
    )


def llama4_vision(fields: Fields) -> Tower:
    """Llama 4's: patches through a linear layer, a class token last, pixels shuffled at the end.

    `intermediate_size` is the width of the blocks' feed-forward and of the shuffled pixels too.
    """
    h, i = fields.size("hidden_size"), fields.size("intermediate_size")
    p, image = square(fields, "patch_size"), square(fields, "image_size")
    activation(fields)
    norm = Norm(kind="layernorm", eps=1e-5, bias=True)  # nn.LayerNorm's own
    into, out = fields.size("projector_input_dim"), fields.size("projector_output_dim")
    rows = patch_count((image, image), (p, p)) + 1
    attention = own_attention(fields, exact=False, qkv_bias=True, o_bias=True)
    return Tower(
        part="vision",
        hidden_size=h,
        layers=same_blocks(
            fields,
            attention=attention,
            feed_forward=Dense(intermediate_size=i, activation="gelu", gated=False, bias=True),
            norm=norm,
        ),
        outer=(
            tensor("class_embedding", h, group="embedding"),
            tensor("positional_embedding_vlm", rows, h, group="embedding"),
            *head_linear(
                "patch_embedding.linear",
                out=h,
                into=fields.size("num_channels") * p * p,
                bias=False,
            ),
            *norm_tensors(norm, "layernorm_pre", h),
            *norm_tensors(norm, "layernorm_post", h),
            *head_linear("vision_adapter.mlp.fc1", out=into, into=i, bias=False),
            *head_linear("vision_adapter.mlp.fc2", out=out, into=out, bias=False),
        ),
        parameter_names=LLAMA4_VISION_NAMES,
        buffer_bytes=8 * rows * (attention.head_dim // 4) * 2,  # a complex number for each turn
    )


def read_pixtral(fields: Fields) -> Model:
    """Pixtral's encoder of images alone."""
    chosen_head(fields, "PixtralVisionModel")
    return image_model(fields, pixtral(fields))


def read_llama4_vision_model(fields: Fields) -> Model:
    """Llama 4's encoder of images alone."""
    chosen_head(fields, "Llama4VisionModel")
    return image_model(fields, llama4_vision(fields))


READERS = {
    "llama4_vision_model": read_llama4_vision_model,
    "pixtral": read_pixtral,
}
