"""Readers of gemma4 and gemma4_unified: a text model with vision and audio beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from planner.errors import ConfigError, check_choice, shown
from planner.huggingface.blocks import activation, chosen_head, gated, layer_count, rmsnorm
from planner.huggingface.fields import Fields
from planner.huggingface.gemma4 import read_gemma4_text, read_gemma4_unified_text
from planner.huggingface.wrapper import named, part, text_by, wrapped
from planner.layers import GQA, Layer, Norm, QKNorm
from planner.model import Model, Tower
from planner.parameters import norm_parameters
from planner.tensors import Parameter, conv1d, linear, tensor

Towers = Callable[[Fields, int, str], tuple[Tower, ...]]
"""From the fields of a part, the width of the text model and the name of the base module."""


def _wrapper(
    fields: Fields, *, stem: str, read_text: Callable[[Fields], Model], towers: dict[str, Towers]
) -> Model:
    """The text model under the wrapper's names, and the towers of the parts that are there.

    Whether embedding and head are one is the wrapper's to say, not the text config's.
    """
    head_class = f"{stem}ForConditionalGeneration"
    head = chosen_head(fields, head_class, f"{stem}Model") == head_class
    base, kind = "model." if head else "", fields.model_type
    inner = part(fields, "text_config", f"{kind}_text", only=True)
    text, _ = text_by({inner.model_type: read_text}, inner, fields)
    made: list[Tower] = []
    for name, read_tower in towers.items():
        config = f"{name}_config"
        if fields.raw(config) is not None:
            inner = part(fields, config, f"{kind}_{name}", only=True)
            with named(config):
                made += read_tower(inner, text.hidden_size, base)
    tie = fields.flag("tie_word_embeddings")
    model = wrapped(fields, text, *made, base=f"{base}language_model", tie=tie, head=head)
    return replace(model, final_logit_softcapping=text.final_logit_softcapping)


def _projector(base: str, name: str, *, out: int, into: int) -> Tower:
    """Into the text model's embeddings; the norm before has no weight."""
    made = linear(f"{base}{name}.embedding_projection", "projector", out=out, into=into, bias=False)
    return Tower(part="projector", outer=tuple(made))


def _check_width(fields: Fields, name: str, width: int) -> None:
    """ConfigError where the projector expects another width than the tower gives."""
    expected = fields.raw("output_proj_dims")
    if expected not in (None, width):
        raise ConfigError(
            f"output_proj_dims={shown(expected)} is not allowed: {name}={width} comes in"
        )


def _vision(fields: Fields, text_hidden_size: int, base: str) -> tuple[Tower, ...]:
    """A bidirectional encoder in gemma's form, with a table of positions for each axis."""
    h, patch = fields.size("hidden_size"), fields.size("patch_size")
    D, norm = fields.size("head_dim"), rmsnorm(fields)
    if D % 4:
        raise ConfigError(f"head_dim={D} is not a multiple of 4: half of it turns with each axis")
    _check_axial(fields)
    _check_width(fields, "hidden_size", h)
    attention = GQA(
        num_attention_heads=fields.size("num_attention_heads"),
        num_key_value_heads=fields.size("num_key_value_heads"),
        head_dim=D,
        scaling=1.0,
        qk_norm=QKNorm(norm=norm, width="head"),
        v_norm=True,
    )
    layer = Layer(
        attention=attention,
        feed_forward=gated(fields, activation_field="hidden_activation"),
        norm=norm,
        placement="sandwich",
    )
    rows = fields.size("position_embedding_size")
    stem = f"{base}vision_tower"
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    vision = Tower(
        part="vision",
        hidden_size=h,
        layers=(layer,) * layer_count(fields),
        outer=(
            *linear(
                f"{stem}.patch_embedder.input_proj", "vision", out=h, into=3 * patch**2, bias=False
            ),
            tensor(f"{stem}.patch_embedder.position_embedding_table", 2, rows, h),
        ),
        parameter_names=(
            ("layers", f"{stem}.encoder.layers"),
            *((name, f"{name}.linear") for name in projections),
        ),
    )
    return vision, _projector(base, "embed_vision", out=text_hidden_size, into=h)


def _check_axial(fields: Fields) -> None:
    given = fields.raw("rope_parameters")
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"rope_parameters={shown(given)} is not allowed: an object or null")
    kind = (given or {}).get("rope_type") or (given or {}).get("type") or "default"
    check_choice("rope_parameters.rope_type", kind, ("default", "axial"))


def _audio(fields: Fields, text_hidden_size: int, base: str) -> tuple[Tower, ...]:
    """A conformer (Universal Speech Model) behind two convolutions of stride 2."""
    h, out = fields.size("hidden_size"), fields.size("output_proj_dims")
    stem = f"{base}audio_tower"
    first, second = _channels(fields)
    subsample = f"{stem}.subsample_conv_projection"
    width = first // 4 * second
    if not width:
        raise ConfigError(f"subsampling_conv_channels has {first}: at least 4 of the first layer")
    norm = rmsnorm(fields)
    audio = Tower(
        part="audio",
        hidden_size=h,
        layers=(_conformer(fields, h, norm),) * layer_count(fields),
        outer=(
            tensor(f"{subsample}.layer0.conv.weight", first, 1, 3, 3),
            tensor(f"{subsample}.layer0.norm.weight", first),
            tensor(f"{subsample}.layer1.conv.weight", second, first, 3, 3),
            tensor(f"{subsample}.layer1.norm.weight", second),
            *linear(f"{subsample}.input_proj_linear", "audio", out=h, into=width, bias=False),
            *linear(f"{stem}.output_proj", "audio", out=out, into=h, bias=True),
        ),
        parameter_names=(("layers", f"{stem}.layers"),),
    )
    return audio, _projector(base, "embed_audio", out=text_hidden_size, into=out)


def _channels(fields: Fields) -> tuple[int, int]:
    name = "subsampling_conv_channels"
    given: Any = fields.raw(name)
    if (
        not isinstance(given, list)
        or len(given) != 2
        or not all(type(n) is int and 0 < n < 2**20 for n in given)
    ):
        raise ConfigError(f"{name}={shown(given)} is not allowed: a list of two sizes")
    return given[0], given[1]


def _conformer(fields: Fields, h: int, norm: Norm) -> Layer:
    """Half a feed-forward, local attention, a convolution and the other half."""
    H = fields.size("num_attention_heads")
    activation(fields)
    if h % H:
        raise ConfigError(f"hidden_size={h} is not a multiple of num_attention_heads={H}")

    def parameters() -> Iterator[Parameter]:
        for name in ("feed_forward1", "feed_forward2"):
            for step, out, into in (("ffw_layer_1", 4 * h, h), ("ffw_layer_2", h, 4 * h)):
                yield from linear(f"{name}.{step}.linear", "audio", out=out, into=into, bias=False)
            yield from norm_parameters(norm, f"{name}.pre_layer_norm", h)
            yield from norm_parameters(norm, f"{name}.post_layer_norm", h)
        for name in ("q_proj.linear", "k_proj.linear", "v_proj.linear", "post.linear"):
            yield from linear(f"self_attn.{name}", "audio", out=h, into=h, bias=False)
        yield from linear("self_attn.relative_k_proj", "audio", out=h, into=h, bias=False)
        yield tensor("self_attn.per_dim_scale", h // H)
        for name, out in (("linear_start", 2 * h), ("linear_end", h)):
            yield from linear(f"lconv1d.{name}.linear", "audio", out=out, into=h, bias=False)
        width = fields.size("conv_kernel_size")
        yield from conv1d("lconv1d.depthwise_conv1d", channels=h, width=width, bias=False)
        yield from norm_parameters(norm, "lconv1d.pre_layer_norm", h)
        yield from norm_parameters(norm, "lconv1d.conv_norm", h)

    return Layer(
        attention=None,
        feed_forward=None,
        norm=norm,
        norms=("norm_pre_attn", "norm_post_attn", "norm_out"),
        extra_parameters=tuple(parameters()),
    )


def _unified_vision(fields: Fields, text_hidden_size: int, base: str) -> tuple[Tower, ...]:
    """No encoder: patches are projected between layer norms, with learned positions."""
    h, rows = fields.size("mm_embed_dim"), fields.size("mm_posemb_size")
    side = fields.size("patch_size") * fields.size("pooling_kernel_size")
    if fields.config.get("model_patch_size", side) != side:
        raise ConfigError(
            f"model_patch_size={shown(fields.raw('model_patch_size'))} is not allowed: patch_size "
            f"· pooling_kernel_size is {side}"
        )
    _check_width(fields, "mm_embed_dim", h)
    norm, patch = Norm(kind="layernorm", eps=1e-5, bias=True), 3 * side**2
    stem = f"{base}embed_vision"
    vision = Tower(
        part="vision",
        outer=(
            *norm_parameters(norm, f"{stem}.patch_ln1", patch),
            *linear(f"{stem}.patch_dense", "vision", out=h, into=patch, bias=True),
            *norm_parameters(norm, f"{stem}.patch_ln2", h),
            tensor(f"{stem}.pos_embedding", rows, 2, h),
            *norm_parameters(norm, f"{stem}.pos_norm", h),
        ),
    )
    name = "embed_vision.multimodal_embedder"
    return vision, _projector(base, name, out=text_hidden_size, into=h)


def _unified_audio(fields: Fields, text_hidden_size: int, base: str) -> tuple[Tower, ...]:
    """No encoder: frames of the raw wave are projected. Four fields name their length."""
    names = ("audio_embed_dim", "hidden_size", "output_proj_dims", "audio_samples_per_token")
    given = {name: fields.config[name] for name in names if name in fields.config}
    if len(set(map(repr, given.values()))) > 1:
        raise ConfigError(f"{shown(given)} is not allowed: they are one field, one length")
    fields.spell(audio_embed_dim=names)
    width = fields.size("audio_embed_dim")
    return (_projector(base, "embed_audio", out=text_hidden_size, into=width),)


def read_gemma4(fields: Fields) -> Model:
    """Gemma-4 with images, and sound in the small models: each part is there with its config."""
    return _wrapper(
        fields,
        stem="Gemma4",
        read_text=read_gemma4_text,
        towers={"vision": _vision, "audio": _audio},
    )


def read_gemma4_unified(fields: Fields) -> Model:
    """Gemma-4 12B: images and sound without encoders."""
    return _wrapper(
        fields,
        stem="Gemma4Unified",
        read_text=read_gemma4_unified_text,
        towers={"vision": _unified_vision, "audio": _unified_audio},
    )


READERS = {"gemma4": read_gemma4, "gemma4_unified": read_gemma4_unified}
