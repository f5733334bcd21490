"""Readers of gemma4 and gemma4_unified: a text model with vision and audio beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from planner.errors import ConfigError, check_choice, shown
from planner.huggingface.blocks import as_json, activation, gated, layer_count, rmsnorm
from planner.huggingface.fields import Fields
from planner.huggingface.gemma4 import read_gemma4_text, read_gemma4_unified_text
from planner.layers import GQA, Layer, Norm, QKNorm
from planner.model import Model, Tower
from planner.parameters import norm_parameters
from planner.tensors import Parameter, conv1d, linear, tensor

Towers = Callable[[Fields, int, str], tuple[Tower, ...]]
"""From the fields of a part, the width of the text model and the name of the base module."""


def _part(fields: Fields, name: str, model_type: str) -> Fields | None:
    """A nested config; None where it is null or absent."""
    given = fields.raw(name)
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name}={shown(given)} is not allowed: an object or null")
    kind = given.get("model_type")
    if kind is not None:
        check_choice(f"{name}.model_type", kind, (model_type,))
    return Fields(given, model_type)


def _wrapper(
    fields: Fields, *, stem: str, read_text: Callable[[Fields], Model], towers: dict[str, Towers]
) -> Model:
    """The text model under the wrapper's names, and the towers of the parts that are there.

    Whether embedding and head are one is the wrapper's to say, not the text config's.
    """
    head_class, base_class = f"{stem}ForConditionalGeneration", f"{stem}Model"
    architectures = fields.config.get("architectures") or [head_class]
    head = architectures[0] if isinstance(architectures, list) else architectures
    check_choice("architectures[0]", head, (head_class, base_class))
    text = _part(fields, "text_config", f"{fields.model_type}_text")
    given = dict(text.config) if text is not None else {}
    dtype = next((d for c in (fields.config, given) if (d := _dtype(c)) is not None), None)
    config = {
        **{name: value for name, value in given.items() if name != "torch_dtype"},
        "dtype": dtype,
        "quantization_config": fields.config.get("quantization_config"),
        "architectures": None,
        "tie_word_embeddings": fields.flag("tie_word_embeddings"),
    }
    model = read_text(Fields(config, f"{fields.model_type}_text"))
    base = "model." if head == head_class else ""
    made: list[Tower] = []
    defaults = [*fields.defaults, *(f"text_config.{taken}" for taken in model.defaults)]
    for name, build in towers.items():
        part = _part(fields, f"{name}_config", f"{fields.model_type}_{name}")
        if part is not None:
            made += build(part, model.hidden_size, base)
            defaults += (f"{name}_config.{taken}" for taken in part.defaults)
    name = fields.config.get("_name_or_path") or fields.model_type
    return replace(
        model,
        name=name if isinstance(name, str) else fields.model_type,
        model_type=fields.model_type,
        text_type=model.model_type,
        lm_head=head == head_class,
        towers=tuple(made),
        parameter_names=tuple(
            (ours, theirs.replace("model.", f"{base}language_model.", 1))
            for ours, theirs in model.parameter_names
        ),
        defaults=tuple(defaults),
        config_json=as_json(fields.config),
    )


def _dtype(config: Mapping[str, Any]) -> Any:
    return config.get("dtype") or config.get("torch_dtype")


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
    check_choice("rope_parameters.rope_type of vision_config", kind, ("default", "axial"))


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
            for part, out, into in (("ffw_layer_1", 4 * h, h), ("ffw_layer_2", h, 4 * h)):
                yield from linear(f"{name}.{part}.linear", "audio", out=out, into=into, bias=False)
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
        raise ConfigError(f"audio_config has {shown(given)}: one length, they are one field")
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
