"""Readers of mistral_large4 and its text model (transformers 5.23, models/mistral_large4/)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from planner.errors import ConfigError, check_size, shown
from planner.huggingface.blocks import activation, causal_lm, gated, layer_count, rmsnorm
from planner.huggingface.deepseek import yarn_scale
from planner.huggingface.fields import Fields
from planner.huggingface.rotary_vision import pixtral
from planner.huggingface.sparse_latent import (
    all_indexed,
    grouped_mixture,
    indexed_layers,
    indexer,
    rotary_part,
    sparse_after_dense,
    spell_experts,
)
from planner.huggingface.towers import inside
from planner.huggingface.wrapped import TEXT_NAMES, Names, part, text_fields, wrapped
from planner.layers import MLA, Layer, RoPE
from planner.model import Model, Tower
from planner.tensors import Parameter, linear, tensor

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 2048.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}
"""What the text's class takes where it has no rope_parameters."""

VISION = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 1540,
    "hidden_act": "silu",
}
"""The wrapper's tower where `vision_config` is null; one with fields has pixtral's defaults."""


def read_mistral_large4_text(fields: Fields) -> Model:
    """The text model of Mistral Large 4 alone; its class has no language-model head."""
    bare = "MistralLarge4TextModel"
    return replace(_text(fields, base_class=bare, head_class=bare, names=()), lm_head=False)


def read_mistral_large4(fields: Fields) -> Model:
    """Mistral Large 4: text, a pixtral tower, and a projector that merges neighbouring patches."""
    inner = text_fields(fields, part(fields, "text_config") or {}, "mistral_large4_text")
    given = part(fields, "vision_config")
    given = VISION if given is None else given
    kind = given.get("model_type", "pixtral")
    if kind != "pixtral":
        raise ConfigError(f"vision_config.model_type={shown(kind)} is not read yet: pixtral")
    vision = Fields(given, "pixtral")
    text = _text(
        inner,
        base_class="MistralLarge4Model",
        head_class="MistralLarge4ForConditionalGeneration",
        names=TEXT_NAMES,
    )
    if text.lm_head:
        text = replace(text, final_logit_softcapping=inner.number("final_logit_softcapping"))
    towers = (_pixtral_tower(vision), _projector(fields, vision, text))
    return wrapped(fields, text, towers=towers, others=(vision,))


def _text(fields: Fields, *, base_class: str, head_class: str, names: Names) -> Model:
    """Latent attention to an indexer's picks; some layers lack positions, some their own latents.

    Each head's queries are scaled by s · ln(position) + b.
    """
    spell_experts(fields)
    all_indexed(fields)
    positions = rotary_part(
        _scaled(fields), head_dim=fields.size("qk_rope_head_dim"), default_is_whole=True
    )
    attentions = _attentions(fields, positions)
    mixture = replace(grouped_mixture(fields), router="softmax", norm_topk_prob=True)
    dense, norm, H = gated(fields), rmsnorm(fields), fields.size("num_attention_heads")
    keys = list(zip(attentions, sparse_after_dense(fields), strict=True))
    made = {
        (attention, sparse): Layer(
            attention=attention,
            feed_forward=mixture if sparse else dense,
            norm=norm,
            extra_parameters=(
                tensor("self_attn.softmax_scaling.scale", H),
                tensor("self_attn.softmax_scaling.bias", H),
            ),
        )
        for attention, sparse in set(keys)
    }
    return causal_lm(
        fields,
        layers=tuple(made[key] for key in keys),
        final_norm=norm,
        positions=positions,
        names=names,
        base_class=base_class,
        head_class=head_class,
    )


def _scaled(fields: Fields) -> Fields:
    if fields.raw("rope_scaling") or fields.raw("rope_parameters") is not None:
        return fields
    fields.take_default("rope_type", "yarn")
    return Fields({**fields.config, "rope_parameters": YARN}, fields.model_type)


def _attentions(fields: Fields, positions: RoPE) -> list[MLA]:
    rotating, sources = _rotating(fields), _sources(fields)
    D_nope, D_rope = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")

    def attention(indexed: bool, rotates: bool, shares: bool) -> MLA:
        own = indexer(fields, rotary_dim=D_rope if rotates else 0, own_queries=True)
        return MLA(
            num_attention_heads=fields.size("num_attention_heads"),
            q_lora_rank=None,
            kv_lora_rank=fields.size("kv_lora_rank"),
            qk_nope_head_dim=D_nope if rotates else D_nope + D_rope,
            qk_rope_head_dim=D_rope if rotates else 0,
            v_head_dim=fields.size("v_head_dim"),
            scaling=(D_nope + D_rope) ** -0.5 * yarn_scale(positions),
            bias=fields.flag("attention_bias"),
            indexer=own if indexed else None,
            shares_cache=shares,
        )

    shared = [source != i for i, source in enumerate(sources)]
    for i, source in enumerate(sources):
        if rotating[i] != rotating[source]:
            raise ConfigError(
                f"kv_source_layers[{i}]={source} is not allowed: of the two layers one has "
                "positions, see no_rope_layers"
            )
    keys = list(zip(indexed_layers(fields), rotating, shared, strict=True))
    made = {key: attention(*key) for key in sorted(set(keys))}
    return [made[key] for key in keys]


def _rotating(fields: Fields) -> list[bool]:
    """Which layers have positions: `no_rope_layers` says 1 for those, or all but every n-th."""
    L, given = layer_count(fields), fields.raw("no_rope_layers")
    if given is None:
        every = check_size("no_rope_layer_interval", fields.config.get("no_rope_layer_interval", 4))
        return [(i + 1) % every != 0 for i in range(L)]
    if not isinstance(given, list) or len(given) < L or any(type(x) is not int for x in given):
        raise ConfigError(f"no_rope_layers={shown(given)} is not allowed: a list of {L} numbers")
    return [bool(x) for x in given[:L]]


def _sources(fields: Fields) -> list[int]:
    """The layer whose latents a layer attends to: itself, or an earlier one that has its own."""
    L, given = layer_count(fields), fields.raw("kv_source_layers")
    if given is None:
        return list(range(L))
    if not isinstance(given, list) or len(given) != L or any(type(x) is not int for x in given):
        raise ConfigError(f"kv_source_layers={shown(given)} is not allowed: a list of {L} numbers")
    for i, source in enumerate(given):
        if not 0 <= source <= i or given[source] != source:
            raise ConfigError(
                f"kv_source_layers[{i}]={source} is not allowed: an earlier layer with latents of "
                "its own"
            )
    return given


def _pixtral_tower(fields: Fields) -> Tower:
    """Pixtral's, in a class that takes no head_dim of its own."""
    h, H = fields.size("hidden_size"), fields.size("num_attention_heads")
    if h % H or h // H % 4:
        raise ConfigError(f"hidden_size={h} is not num_attention_heads={H} times a multiple of 4")
    if fields.has("head_dim") and fields.size("head_dim") != h // H:
        raise ConfigError(f"head_dim={fields.size('head_dim')} is not allowed: {h // H}")
    return inside(pixtral(fields), "model.vision_tower")


def _projector(fields: Fields, vision: Fields, text: Model) -> Tower:
    """Norm, m · m patches into one, two linears; as many layers' features as there are named."""
    activation(fields, "projector_hidden_act")
    layers, h, out = (
        fields.raw("vision_feature_layer"),
        vision.size("hidden_size"),
        text.hidden_size,
    )
    named = layers if isinstance(layers, list) else [layers]
    if not named or any(type(index) is not int for index in named):
        raise ConfigError(
            f"vision_feature_layer={shown(layers)} is not allowed: a number or a list of them"
        )
    bias, m = fields.flag("multimodal_projector_bias"), fields.size("spatial_merge_size")
    name = "model.multi_modal_projector"
    parameters: list[Parameter] = [
        tensor(f"{name}.norm.weight", h),
        tensor(f"{name}.patch_merger.merging_layer.weight", h, h * m * m),
        *linear(f"{name}.linear_1", "projector", out=out, into=h * len(named), bias=bias),
        *linear(f"{name}.linear_2", "projector", out=out, into=out, bias=bias),
    ]
    return Tower(part="projector", outer=tuple(parameters))


READERS: dict[str, Callable[[Fields], Model]] = {
    "mistral_large4": read_mistral_large4,
    "mistral_large4_text": read_mistral_large4_text,
}
