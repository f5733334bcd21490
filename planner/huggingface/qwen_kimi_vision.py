"""Readers of qwen3_5, qwen3_5_moe and kimi_k25: a language model with a vision tower beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from planner.errors import MAX_LAYERS, ConfigError, check_size, shown
from planner.huggingface.blocks import activation, as_json, gqa
from planner.huggingface.deepseek import read_deepseek_v3
from planner.huggingface.fields import Fields
from planner.huggingface.linear_attention import read_qwen3_5_moe_text, read_qwen3_5_text
from planner.layers import Dense, Layer, Norm
from planner.model import Model, Tower
from planner.tensors import Group, Parameter, linear, tensor

Names = tuple[tuple[str, str], ...]


def sub_fields(fields: Fields, name: str, model_type: str) -> Fields:
    """A config inside the config, read by the class of `model_type`; null or absent: defaults."""
    given = fields.raw(name)
    if given is None:
        given = {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name}={shown(given)} is not allowed: an object or null")
    return Fields(given, model_type)


def wrapped(
    fields: Fields,
    text: Fields,
    read_text: Callable[[Fields], Model],
    *,
    stem: str,
    towers: Callable[[str], tuple[Tower, ...]],
    spelled_stem: str | None = None,
) -> Model:
    """The text model as `<stem>Model` and `<stem>ForConditionalGeneration` hold it.

    The wrapper's own tie, dtype and quantisation count. `towers` makes those beside it from the
    module that they stand in. `spelled_stem`: how published configs write the class.
    """
    base_class, head_class = f"{stem}Model", f"{stem}ForConditionalGeneration"
    head = architecture(fields, head_class).replace(spelled_stem or stem, stem)
    if head not in (base_class, head_class):
        raise ConfigError(
            f"architectures[0]={shown(head)} is not read yet: one of {head_class}, {base_class}"
        )
    model = text_alone(fields, text, read_text, tied=fields.flag("tie_word_embeddings"))
    module = "model." if head == head_class else ""
    names = tuple(
        (ours, theirs.replace("model.", f"{module}language_model.", 1))
        for ours, theirs in model.parameter_names
    )
    return replace(
        model,
        lm_head=head == head_class,
        parameter_names=names,
        towers=towers(module),
        defaults=(*fields.defaults, *model.defaults),
    )


def architecture(fields: Fields, absent: str) -> str:
    """`architectures[0]`, whatever it names."""
    given = fields.config.get("architectures") or [absent]
    first = given[0] if isinstance(given, list) else given
    return str(first)


def text_alone(
    fields: Fields,
    text: Fields,
    read_text: Callable[[Fields], Model],
    *,
    tied: bool,
) -> Model:
    """The language model inside, with its head, under the wrapper's type and name."""
    config: dict[str, Any] = {**text.config, "tie_word_embeddings": tied, "architectures": None}
    dtypes = [source.get(key) for source in (fields.config, text.config) for key in DTYPE_KEYS]
    config["dtype"] = next((dtype for dtype in dtypes if dtype is not None), None)
    for key in ("quantization_config", "_name_or_path"):  # the text's own where it has one
        config[key] = fields.config.get(key) or text.config.get(key)
    config["_name_or_path"] = config["_name_or_path"] or fields.model_type
    model = read_text(Fields(config, text.model_type))
    return replace(
        model,
        model_type=fields.model_type,
        text_type=text.model_type,
        config_json=as_json(fields.config),
    )


DTYPE_KEYS = ("dtype", "torch_dtype")


def _qwen(fields: Fields, *, stem: str, read_text: Callable[[Fields], Model]) -> Model:
    """`<stem>ForCausalLM` takes the language model alone, tied as its own config says."""
    text = sub_fields(fields, "text_config", f"{fields.model_type}_text")
    vision = sub_fields(fields, "vision_config", f"{fields.model_type}_vision")
    if architecture(fields, "") == f"{stem}ForCausalLM":
        return text_alone(fields, text, read_text, tied=text.flag("tie_word_embeddings"))
    return wrapped(
        fields,
        text,
        read_text,
        stem=stem,
        towers=lambda module: _qwen_towers(vision, f"{module}visual"),
    )


def read_qwen3_5(fields: Fields) -> Model:
    """Qwen3.5: the dense language model and its vision tower."""
    return _qwen(fields, stem="Qwen3_5", read_text=read_qwen3_5_text)


def read_qwen3_5_moe(fields: Fields) -> Model:
    """Qwen3.5-MoE: the language model with mixtures, the same vision tower."""
    return _qwen(fields, stem="Qwen3_5Moe", read_text=read_qwen3_5_moe_text)


def read_kimi_k25(fields: Fields) -> Model:
    """Kimi K2.5: a DeepSeek-V3 and a vision tower; tied unless the config says otherwise."""
    given = fields.raw("text_config")
    kind = given.get("model_type", "deepseek_v3") if isinstance(given, Mapping) else "deepseek_v3"
    if kind not in ("deepseek_v3", "kimi_k2"):
        raise ConfigError(
            f"text_config.model_type={shown(kind)} is not read in kimi_k25: deepseek_v3, kimi_k2"
        )
    text = sub_fields(fields, "text_config", "deepseek_v3")
    vision = sub_fields(fields, "vision_config", "kimi_k25_vision")
    return wrapped(
        fields,
        text,
        read_deepseek_v3,
        stem="Kimi_K25",
        spelled_stem="KimiK25",
        towers=lambda module: _kimi_towers(fields, text, vision, module),
    )


def _blocks(vision: Fields, *, depth: str, heads: str, fused: bool, eps: float) -> Tower:
    """Blocks of attention over all patches and a plain feed-forward, LayerNorms before each."""
    h, H = vision.size("hidden_size"), vision.size(heads)
    if h % H:
        raise ConfigError(f"vision_config: hidden_size={h} is not a multiple of {heads}={H}")
    _axial(vision)
    block = Layer(
        attention=gqa((H, H, h // H), qkv_bias=True, o_bias=True, fused_qkv=fused),
        feed_forward=Dense(
            intermediate_size=vision.size("intermediate_size"),
            activation=activation(vision),
            gated=False,
            bias=True,
        ),
        norm=Norm(kind="layernorm", eps=eps, bias=True),
    )
    return Tower(
        part="vision",
        hidden_size=h,
        layers=(block,) * vision.size(depth, minimum=0, maximum=MAX_LAYERS),
    )


def _axial(vision: Fields) -> None:
    """ConfigError where the config asks for rotary positions that are not of rows and columns."""
    kind = vision.rope_parameters()["rope_type"]
    if kind not in ("default", "axial"):
        raise ConfigError(f"vision_config: rope_type={shown(kind)} is not allowed: axial")


def _names(module: str, *, qkv: str, fc: tuple[str, str]) -> Names:
    return (
        ("layers", module),
        ("self_attn.o_proj", "attn.proj"),
        ("self_attn.qkv_proj", f"attn.{qkv}"),
        ("self_attn", "attn"),
        ("mlp.up_proj", f"mlp.{fc[0]}"),
        ("mlp.down_proj", f"mlp.{fc[1]}"),
        ("input_layernorm", "norm1"),
        ("post_attention_layernorm", "norm2"),
    )


def _projection(name: str, group: Group, *, out: int, into: int) -> tuple[Parameter, ...]:
    return tuple(linear(name, group, out=out, into=into, bias=True))


def _both(name: str, *weight: int, group: Group) -> tuple[Parameter, ...]:
    """A weight, and a bias as long as its first dimension."""
    return (
        tensor(f"{name}.weight", *weight, group=group),
        tensor(f"{name}.bias", weight[0], group=group),
    )


def _qwen_towers(vision: Fields, module: str) -> tuple[Tower, ...]:
    """Patches of space and time, learned positions on a grid; a merger of m · m patches."""
    blocks = _blocks(vision, depth="depth", heads="num_heads", fused=True, eps=1e-6)
    h, patch = blocks.hidden_size, vision.size("patch_size")
    patches = (vision.size("in_channels"), vision.size("temporal_patch_size"), patch, patch)
    positions = vision.size("num_position_embeddings")
    tower = replace(
        blocks,
        outer=(
            *_both(f"{module}.patch_embed.proj", h, *patches, group="vision"),
            tensor(f"{module}.pos_embed.weight", positions, h, group="vision"),
        ),
        parameter_names=_names(f"{module}.blocks", qkv="qkv", fc=("linear_fc1", "linear_fc2")),
    )
    wide, out = h * vision.size("spatial_merge_size") ** 2, vision.size("out_hidden_size")
    merger = Tower(
        part="projector",
        outer=(
            *_both(f"{module}.merger.norm", h, group="projector"),
            *_projection(f"{module}.merger.linear_fc1", "projector", out=wide, into=wide),
            *_projection(f"{module}.merger.linear_fc2", "projector", out=out, into=wide),
        ),
    )
    return tower, merger


def _kimi_towers(fields: Fields, text: Fields, vision: Fields, module: str) -> tuple[Tower, ...]:
    """Patches and learned positions of rows and columns; a projector of merged patches."""
    blocks = _blocks(
        vision, depth="num_hidden_layers", heads="num_attention_heads", fused=False, eps=1e-5
    )
    h, patch, where = blocks.hidden_size, vision.size("patch_size"), f"{module}vision_tower"
    grid = (vision.size("pos_emb_height"), vision.size("pos_emb_width"))
    embed = f"{where}.patch_embed"
    tower = replace(
        blocks,
        outer=(
            *_both(f"{embed}.proj", h, 3, patch, patch, group="vision"),
            tensor(f"{embed}.pos_emb.position_embeddings", *grid, h, group="vision"),
            *_both(f"{where}.final_layernorm", h, group="vision"),
        ),
        parameter_names=_names(f"{where}.layers", qkv="qkv", fc=("fc1", "fc2")),
    )
    normed, project = fields.size("projection_hidden_size"), f"{module}mm_projector"
    if normed != h:
        raise ConfigError(
            f"projection_hidden_size={normed} is not allowed: vision_config.hidden_size={h}"
        )
    wide, out = h * _merged_patches(vision), text.size("hidden_size")
    projector = Tower(
        part="projector",
        outer=(
            *_both(f"{project}.pre_norm", normed, group="projector"),
            *_projection(f"{project}.in_proj", "projector", out=wide, into=wide),
            *_projection(f"{project}.out_proj", "projector", out=out, into=wide),
        ),
    )
    return tower, projector


def _merged_patches(vision: Fields) -> int:
    sides = vision.raw("merge_kernel_size")
    if not isinstance(sides, list | tuple) or len(sides) != 2:
        raise ConfigError(f"merge_kernel_size={shown(sides)} is not allowed: two whole numbers")
    rows, columns = (check_size("merge_kernel_size", side) for side in sides)
    return rows * columns


READERS = {
    "kimi_k25": read_kimi_k25,
    "qwen3_5": read_qwen3_5,
    "qwen3_5_moe": read_qwen3_5_moe,
}
