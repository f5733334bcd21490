"""What encoders of images share, beside a language model or alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from planner.ends import Ends
from planner.errors import ConfigError, check_size, shown
from planner.huggingface.blocks import about, gqa, layer_count
from planner.huggingface.fields import Fields
from planner.layers import GQA, Dense, Layer, NoPositions, Norm
from planner.model import Model, Tower
from planner.tensors import Group, Parameter, linear, tensor

Names = tuple[tuple[str, str], ...]

CLIP_LIKE: Names = (
    ("layers", "encoder.layers"),
    ("self_attn.o_proj", "self_attn.out_proj"),
    ("input_layernorm", "layer_norm1"),
    ("post_attention_layernorm", "layer_norm2"),
    ("mlp.up_proj", "mlp.fc1"),
    ("mlp.down_proj", "mlp.fc2"),
)
"""Names in the blocks of clip and of what was written after it."""


def own_attention(
    fields: Fields, *, width: str = "hidden_size", exact: bool = True, **extra: Any
) -> GQA:
    """All heads with keys of their own, head_dim = width / heads.

    `exact=False`: the class rounds down where that does not divide.
    """
    h, H = fields.size(width), fields.size("num_attention_heads")
    if h < H or (exact and h % H):
        raise ConfigError(f"{width}={h} is not a multiple of num_attention_heads={H}")
    return gqa((H, H, h // H), **extra)


def same_blocks(
    fields: Fields,
    *,
    attention: GQA,
    feed_forward: Dense,
    norm: Norm,
    extra: Iterable[Parameter] = (),
) -> tuple[Layer, ...]:
    """`num_hidden_layers` blocks that are all alike."""
    layer = Layer(
        attention=attention, feed_forward=feed_forward, norm=norm, extra_parameters=tuple(extra)
    )
    return (layer,) * layer_count(fields)


def square(fields: Fields, name: str) -> int:
    """A size in pixels of classes that know squares only."""
    value = fields.raw(name)
    if isinstance(value, list):
        raise ConfigError(f"{name}={shown(value)} is not allowed: one number, for squares")
    return fields.size(name)


def sides(fields: Fields, name: str) -> tuple[int, int]:
    """(height, width) in pixels: one number for both, or a list of two."""
    value = fields.raw(name)
    if not isinstance(value, list):
        size = fields.size(name)
        return size, size
    if len(value) != 2:
        raise ConfigError(f"{name}={shown(value)} is not allowed: a number or a list of two")
    return check_size(name, value[0]), check_size(name, value[1])


def patch_count(image: tuple[int, int], patch: tuple[int, int]) -> int:
    """Whole patches in an image."""
    patches = (image[0] // patch[0]) * (image[1] // patch[1])
    if not patches:
        raise ConfigError(f"image_size={image} is not allowed: at least patch_size={patch}")
    return patches


def conv(name: str, *shape: int, bias: bool) -> list[Parameter]:
    """The convolution that cuts patches: weight [out, in, …], and its bias."""
    weight = tensor(f"{name}.weight", *shape, group="embedding")
    return [weight, tensor(f"{name}.bias", shape[0], group="embedding")] if bias else [weight]


def head_linear(name: str, *, out: int, into: int, bias: bool = True) -> tuple[Parameter, ...]:
    """A linear layer behind the encoder."""
    return tuple(linear(name, "head", out=out, into=into, bias=bias))


def classifier(fields: Fields, *, into: int) -> tuple[Parameter, ...]:
    """A linear layer with an output for each label; none without labels."""
    labels = label_count(fields)
    return head_linear("classifier", out=labels, into=into) if labels else ()


def label_count(fields: Fields) -> int:
    """`num_labels`; absent: as many as `id2label` has; absent: 2."""
    if "num_labels" in fields.config:
        return check_size("num_labels", fields.config["num_labels"], minimum=0)
    labels = fields.config.get("id2label")
    if labels is None:
        fields.take_default("num_labels", 2)
        return 2
    if not isinstance(labels, Mapping):
        raise ConfigError(f"id2label={shown(labels)} is not allowed: an object or null")
    return len(labels)


def norm_tensors(norm: Norm, name: str, width: int, group: Group = "norm") -> list[Parameter]:
    """Scale and bias of a norm outside the blocks."""
    made = [tensor(f"{name}.weight", width, group=group)] if norm.weight else []
    return [*made, tensor(f"{name}.bias", width, group=group)] if norm.bias else made


OUTER = ("layers", "embed_tokens", "embed_positions", "norm")
"""Names of what stands right under a model."""


def rooted(names: Names, base: str) -> Names:
    """The names of a model that is the module `base` of another one."""
    if not base:
        return names
    return tuple((ours, f"{base}.{theirs}" if ours in OUTER else theirs) for ours, theirs in names)


def inside(tower: Tower, base: str) -> Tower:
    """The same tower as the module `base` of a model."""
    return replace(
        tower,
        outer=tuple(replace(p, name=f"{base}.{p.name}") for p in tower.outer),
        parameter_names=rooted(tower.parameter_names, base),
    )


def image_model(fields: Fields, tower: Tower, *head: Parameter, ends: Ends | None = None) -> Model:
    """An encoder of images by itself: no vocabulary, positions of patches, no cache."""
    return Model(
        hidden_size=tower.hidden_size,
        vocab_size=0,
        max_position_embeddings=None,
        layers=tower.layers,
        final_norm=None,
        positions=NoPositions(),
        tie_word_embeddings=False,
        lm_head=False,
        is_decoder=False,
        ends=ends,
        extra_parameters=(*tower.outer, *head),
        parameter_names=tower.parameter_names,
        **about(fields),
    )
