"""Decoders whose blocks differ: dense layers among mixtures, positions by the kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from planner.errors import ConfigError, shown
from planner.huggingface.blocks import causal_lm, layer_count, rope
from planner.huggingface.fields import Fields
from planner.layers import GQA, Dense, Layer, MoE, Norm, Placement, Positions, RoPE
from planner.model import Model


def decoder(
    fields: Fields,
    *,
    stem: str,
    attentions: Sequence[GQA],
    feed_forwards: Sequence[Dense | MoE],
    norm: Norm,
    positions: Positions,
    placement: Placement = "pre",
    residual_multiplier: float | None = None,
    base_class: str | None = None,
    **extra: Any,
) -> Model:
    """A decoder from the attention and the feed-forward of every layer; equal blocks are one."""
    made: dict[tuple[GQA, Dense | MoE], Layer] = {}
    for pair in zip(attentions, feed_forwards, strict=True):
        attention, feed_forward = pair
        made.setdefault(
            pair,
            Layer(
                attention=attention,
                feed_forward=feed_forward,
                norm=norm,
                placement=placement,
                residual_multiplier=residual_multiplier,
            ),
        )
    return causal_lm(
        fields,
        layers=tuple(made[pair] for pair in zip(attentions, feed_forwards, strict=True)),
        final_norm=norm,
        positions=positions,
        base_class=base_class or f"{stem}Model",
        head_class=f"{stem}ForCausalLM",
        **extra,
    )


def windowed(attention: GQA, windows: Sequence[int | None]) -> list[GQA]:
    """The attention of every layer, with its window."""
    made = {window: replace(attention, sliding_window=window) for window in windows}
    return [made[window] for window in windows]


def required_kv_heads(fields: Fields) -> None:
    """ConfigError where `num_key_value_heads` is null and the class does not fill it in."""
    fields.size("num_key_value_heads")


def sparse_layers(fields: Fields, *, dense: Dense, mixture: MoE | None) -> list[Dense | MoE]:
    """Every `decoder_sparse_step`-th layer a mixture, those of `mlp_only_layers` dense."""
    only = fields.raw("mlp_only_layers")
    if only is None:
        only = []
    if not isinstance(only, list) or not all(type(index) is int for index in only):
        raise ConfigError(f"mlp_only_layers={shown(only)} is not allowed: a list of layer numbers")
    step, dense_layers = fields.size("decoder_sparse_step"), set(only)
    return [
        dense if mixture is None or i in dense_layers or (i + 1) % step else mixture
        for i in range(layer_count(fields))
    ]


def rope_by_kind(
    fields: Fields, *, head_dim: int, thetas: dict[str, tuple[str | None, float]]
) -> tuple[RoPE, RoPE]:
    """(positions of full layers, positions of sliding layers).

    `thetas`: for each kind of layer the old field with its base and the base where it is absent.
    An old `rope_scaling` is that of the full layers alone; transformers 5.23 does so in
    convert_rope_params_to_dict of gemma3 and olmo3.
    """
    given = fields.raw("rope_parameters")
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"rope_parameters={shown(given)} is not allowed: an object or null")
    made = []
    for kind in ("full_attention", "sliding_attention"):
        parameters = (given or {}).get(kind)
        if parameters is None:
            parameters = {}
        scaling = fields.raw("rope_scaling")
        for value in (parameters, scaling or {}):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"rope_parameters has {shown(value)} for {kind}: an object or null"
                )
        if kind == "full_attention" and scaling:
            parameters = {**parameters, **scaling}
        if "rope_theta" not in parameters:
            name, absent = thetas[kind]
            if name is not None and fields.has(name):
                theta = fields.raw(name)
            else:
                theta = absent
                fields.take_default(f"rope_theta of {kind}", absent)
            parameters = {**parameters, "rope_theta": theta}
        config = {**fields.config, "rope_parameters": parameters, "rope_scaling": None}
        made.append(rope(Fields(config, fields.model_type), head_dim=head_dim))
    return made[0], made[1]
