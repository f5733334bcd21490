"""Readers of gemma4_text and gemma4_unified_text (transformers 5.23)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from planner.errors import ConfigError, check_choice, check_size, shown
from planner.huggingface.blocks import SCALED_ROPE, causal_lm, gated, rmsnorm, rope
from planner.huggingface.fields import Fields
from planner.huggingface.gemma_later import (
    FULL,
    GEMMA_NAMES,
    SLIDING,
    check_padding,
    layer_kinds,
    per_layer_embeddings,
    per_layer_inputs,
    sharing_layers,
)
from planner.layers import GQA, Dense, Layer, MoE, Norm, QKNorm, RoPE
from planner.model import Model
from planner.parameters import norm_parameters
from planner.tensors import Parameter, tensor

GEMMA4_NAMES = (
    ("mlp.gate", "router.proj"),
    ("mlp.experts", "experts"),
    ("mlp.shared_experts", "mlp"),
    *GEMMA_NAMES,
)
ROPE: dict[str, dict[str, Any]] = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
}
"""The positions of each kind of layer where `rope_parameters` is absent."""

Heads = tuple[int, int]
"""Key-value heads and the width of a head."""


def _heads(fields: Fields, kinds: Sequence[str]) -> dict[str, Heads]:
    """Those of each kind of layer: full layers have wider heads, and fewer where keys are values.

    A saved config says so in `per_layer_config`, in place of the two `global` fields.
    """
    everywhere = fields.size("num_key_value_heads"), fields.size("head_dim")
    if fields.has("per_layer_config"):
        saved = fields.raw("per_layer_config")
        return _saved_heads({} if saved is None else saved, kinds, everywhere)
    G = everywhere[0]
    if fields.flag("attention_k_eq_v"):
        G = fields.optional_size("num_global_key_value_heads") or G
    fields.suppose(global_head_dim=512)
    return {SLIDING: everywhere, FULL: (G, fields.size("global_head_dim"))}


def _saved_heads(given: Any, kinds: Sequence[str], everywhere: Heads) -> dict[str, Heads]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"per_layer_config={shown(given)} is not allowed: an object or null")
    layers = [everywhere] * len(kinds)
    for index, change in given.items():
        number = int(index) if isinstance(index, str) and index.isdecimal() else -1
        if not 0 <= number < len(kinds) or not isinstance(change, Mapping):
            raise ConfigError(
                f"per_layer_config has {shown(index)}: {shown(change)}: an object for each of "
                f"some layers from 0 to {len(kinds) - 1}"
            )
        G, D = everywhere
        for name, value in change.items():
            check_choice("a field of per_layer_config", name, ("num_key_value_heads", "head_dim"))
            check_size(f"per_layer_config.{index}.{name}", value)
        layers[number] = change.get("num_key_value_heads", G), change.get("head_dim", D)
    made = dict(zip(kinds, layers, strict=True))
    for i, (kind, layer) in enumerate(zip(kinds, layers, strict=True)):
        if layer != made[kind]:
            raise ConfigError(
                f"per_layer_config makes layer {i} unlike the last {kind} layer: one kind of layer "
                "shares its positions, so its heads are equal"
            )
    return made


def _positions(fields: Fields, kind: str, D: int) -> RoPE:
    if fields.has("rope_scaling"):  # even null would take the place of rope_parameters
        raise ConfigError(
            f"rope_scaling={shown(fields.raw('rope_scaling'))} is not allowed: rope_parameters"
        )
    given = fields.raw("rope_parameters")
    if given is None:
        fields.take_default(f"rope_theta of {kind}", ROPE[kind]["rope_theta"])
        given = ROPE
    parameters = given.get(kind) if isinstance(given, Mapping) else None
    if not isinstance(parameters, Mapping) or parameters.get("rope_theta") is None:
        raise ConfigError(
            f"rope_parameters={shown(given)} is not allowed: {kind} in it is an object with "
            "rope_theta"
        )
    part = parameters.get("partial_rotary_factor", 1.0)
    config = {**fields.config, "rope_parameters": dict(parameters), "rope_scaling": None}
    types = (*SCALED_ROPE, "proportional")
    made = rope(Fields(config, fields.model_type), head_dim=D, rope_types=types)
    if made.rope_type == "default":  # the class turns the whole head, whatever the part
        return made
    highest = 1 if made.rope_type == "proportional" else 0
    good = isinstance(part, int | float) and (part == 1 or 0 <= part <= highest > 0)
    if not good:
        raise ConfigError(
            f"partial_rotary_factor={shown(part)} of {kind} is not allowed with "
            f"rope_type={made.rope_type}: "
            f"{'a number from 0 to 1' if highest else 'scaled frequencies cover the whole head'}"
        )
    if made.rope_type == "proportional":
        made = replace(made, scaling=(*made.scaling, ("partial_rotary_factor", part)))
    needed = "original_max_position_embeddings"
    if made.rope_type in ("llama3", "longrope", "yarn") and needed not in parameters:
        raise ConfigError(f"{needed} is missing from rope_parameters.{kind}: a whole number ≥ 1")
    return made


def _window(fields: Fields) -> int:
    """`sliding_window`; it counts both sides where attention is bidirectional, the cache one."""
    window, mode = fields.size("sliding_window"), fields.raw("use_bidirectional_attention")
    if mode is not None:
        check_choice("use_bidirectional_attention", mode, ("all", "vision"))
    return window // 2 + 1 if mode == "all" else window


def _mixture(fields: Fields, dense: Dense) -> MoE:
    """Experts beside the dense feed-forward, each with norms of its own."""
    return MoE(
        num_experts=fields.size("num_experts"),
        num_experts_per_tok=fields.size("top_k_experts"),
        moe_intermediate_size=fields.size("moe_intermediate_size"),
        activation=dense.activation,
        router="softmax",
        linear_router=True,
        shared=dense,
    )


def _mixture_extras(fields: Fields, norm: Norm) -> Iterator[Parameter]:
    h = fields.size("hidden_size")
    yield tensor("router.scale", h, group="router")
    yield tensor("router.per_expert_scale", fields.size("num_experts"), group="router")
    for name in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
        yield from norm_parameters(norm, name, h)
    yield from norm_parameters(norm, "pre_feedforward_layernorm_2", h)


def _decoder(fields: Fields, *, stem: str, per_layer: int, mixtures: bool) -> Model:
    norm, kinds = rmsnorm(fields), layer_kinds(fields, every=6)
    kinds[-1] = FULL  # the config class sees to that
    shared = sharing_layers(fields, kinds)
    h, H = fields.size("hidden_size"), fields.size("num_attention_heads")
    bias = fields.flag("attention_bias")
    sizes, window = _heads(fields, kinds), _window(fields)
    k_eq_v, wide = fields.flag("attention_k_eq_v"), fields.flag("use_double_wide_mlp")
    narrow = gated(fields, activation_field="hidden_activation")
    extra: tuple[Parameter, ...] = ()
    if per_layer:
        extra += tuple(per_layer_inputs(h, per_layer, norm))
    if mixtures:
        extra += tuple(_mixture_extras(fields, norm))

    def layer(kind: str, shares: bool) -> Layer:
        G, D = sizes[kind]
        twice = 2 if wide and shares else 1
        dense = replace(narrow, intermediate_size=twice * narrow.intermediate_size)
        return Layer(
            attention=GQA(
                num_attention_heads=H,
                num_key_value_heads=G,
                head_dim=D,
                scaling=1.0,
                sliding_window=window if kind == SLIDING else None,
                qkv_bias=bias,
                o_bias=bias,
                qk_norm=QKNorm(norm=norm, width="head"),
                v_norm=True,
                attention_k_eq_v=k_eq_v and kind == FULL,
                shares_cache=shares,
            ),
            feed_forward=_mixture(fields, dense) if mixtures else dense,
            norm=norm,
            placement="sandwich",
            extra_parameters=extra,
        )

    made = {key: layer(*key) for key in dict.fromkeys(zip(kinds, shared, strict=True))}
    positions = {kind: _positions(fields, kind, sizes[kind][1]) for kind in dict.fromkeys(kinds)}
    return causal_lm(
        fields,
        layers=tuple(made[key] for key in zip(kinds, shared, strict=True)),
        final_norm=norm,
        positions=positions[FULL],
        local_positions=positions.get(SLIDING),
        names=GEMMA4_NAMES,
        base_class=f"{stem}TextModel",
        head_class=f"{stem}ForCausalLM",
        extra_parameters=(
            tuple(per_layer_embeddings(fields, per_layer, norm)) if per_layer else ()
        ),
        embedding_scale=h**0.5,
        final_logit_softcapping=fields.optional_number("final_logit_softcapping"),
    )


def read_gemma4_text(fields: Fields) -> Model:
    """Gemma-4: full layers with heads of `global_head_dim`, perhaps keys that are values too.

    Layers may share caches (their feed-forward is then twice as wide by `use_double_wide_mlp`),
    have embeddings of their own, and experts beside the dense feed-forward.
    """
    tables = ["vocab_size"]
    per_layer = fields.size("hidden_size_per_layer_input", minimum=0)
    if per_layer:
        tables.append("vocab_size_per_layer_input")
    elif fields.size("num_kv_shared_layers", minimum=0):
        raise ConfigError(
            f"num_kv_shared_layers={fields.raw('num_kv_shared_layers')} is not allowed with "
            "hidden_size_per_layer_input=0: the forward of transformers fails on it"
        )
    check_padding(fields, *tables)
    return _decoder(
        fields, stem="Gemma4", per_layer=per_layer, mixtures=fields.flag("enable_moe_block")
    )


def read_gemma4_unified_text(fields: Fields) -> Model:
    """Gemma-4 12B: gemma4_text without experts and embeddings for each layer."""
    check_padding(fields, "vocab_size")
    return _decoder(fields, stem="Gemma4Unified", per_layer=0, mixtures=False)


READERS = {"gemma4_text": read_gemma4_text, "gemma4_unified_text": read_gemma4_unified_text}
