"""What several families share: heads, windows, positions, the language-model head."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from planner.dtypes import from_torch_name
from planner.errors import MAX_LAYERS, ConfigError, shown
from planner.huggingface.fields import Fields, check_positive
from planner.layers import (
    ACTIVATIONS,
    GQA,
    Activation,
    Dense,
    Layer,
    MoE,
    Norm,
    Placement,
    Positions,
    RoPE,
)
from planner.model import Model
from planner.quantization import read_quantization

SCALED_ROPE = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
FROM_TRAINED_LENGTH = ("yarn", "longrope", "su", "llama3")
LLAMA_NAMES = (
    ("embed_tokens", "model.embed_tokens"),
    ("layers", "model.layers"),
    ("norm", "model.norm"),
)


def layer_count(fields: Fields) -> int:
    """`num_hidden_layers`, bounded."""
    return fields.size("num_hidden_layers", maximum=MAX_LAYERS)


def activation(fields: Fields, name: str = "hidden_act") -> Activation:
    """The feed-forward's activation."""
    return fields.choice(name, ACTIVATIONS)  # type: ignore[return-value]


def rmsnorm(fields: Fields, *, plus_one: bool = False) -> Norm:
    """RMSNorm with the config's epsilon."""
    return Norm(kind="rmsnorm", eps=fields.number("rms_norm_eps"), plus_one=plus_one)


def layernorm(fields: Fields, name: str = "layer_norm_eps", *, bias: bool = True) -> Norm:
    """LayerNorm with the epsilon of field `name`."""
    return Norm(kind="layernorm", eps=fields.number(name), bias=bias)


def gated(
    fields: Fields,
    *,
    activation_field: str = "hidden_act",
    size_field: str = "intermediate_size",
    bias: bool = False,
    fused: bool = False,
) -> Dense:
    """A gated feed-forward: down(act(gate(x)) · up(x))."""
    return Dense(
        intermediate_size=fields.size(size_field),
        activation=activation(fields, activation_field),
        gated=True,
        bias=bias,
        fused_gate_up=fused,
    )


def plain(
    fields: Fields,
    *,
    activation_field: str = "hidden_act",
    intermediate_size: int | None = None,
    bias: bool = True,
) -> Dense:
    """A feed-forward without a gate: down(act(up(x)))."""
    return Dense(
        intermediate_size=intermediate_size or fields.size("intermediate_size"),
        activation=activation(fields, activation_field),
        gated=False,
        bias=bias,
    )


def heads(fields: Fields, *, divisible_hidden: bool = False) -> tuple[int, int, int]:
    """(query heads, kv heads, head_dim); kv heads absent: all; head_dim absent: hidden / heads."""
    H = fields.size("num_attention_heads")
    G = fields.optional_size("num_key_value_heads") or H
    h = fields.size("hidden_size")
    D = fields.optional_size("head_dim")
    if h % H and (D is None or divisible_hidden):
        raise ConfigError(f"hidden_size={h} is not a multiple of num_attention_heads={H}")
    return H, G, D if D is not None else h // H


def layer_windows(fields: Fields, *, window: int | None) -> list[int | None]:
    """The sliding window of every layer: by `layer_types` where the config has them, else `window`.

    transformers 5.23 decides so in cache_utils.get_layer_types_and_kwargs.
    """
    L = layer_count(fields)
    types = fields.raw("layer_types")
    if types is None:
        return [window] * L
    if not isinstance(types, list) or len(types) != L:
        raise ConfigError(f"layer_types={shown(types)} is not allowed: a list of {L} words")
    windows: list[int | None] = []
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise ConfigError(
                f"layer_types has {shown(kind)}: one of full_attention, sliding_attention"
            )
        if kind == "sliding_attention" and window is None:
            raise ConfigError("sliding_window=None is not allowed: layer_types has sliding layers")
        windows.append(window if kind == "sliding_attention" else None)
    return windows


def stray_windows(fields: Fields) -> list[int | None]:
    """Classes without a window of their own: a `sliding_window` does clip the cache all the same.

    transformers 5.23 decides so in cache_utils.get_layer_types_and_kwargs.
    """
    return layer_windows(fields, window=fields.optional_size("sliding_window"))


def rope(
    fields: Fields,
    *,
    head_dim: int,
    rope_types: Sequence[str] = SCALED_ROPE,
    partial: bool = False,
    partial_default: float = 1.0,
    interleaved: bool = False,
) -> RoPE:
    """Rotary positions; `partial` families rotate only the first part of a head."""
    parameters = fields.rope_parameters()
    rope_type = parameters.pop("rope_type")
    if rope_type not in rope_types:
        allowed = ", ".join(rope_types)
        raise ConfigError(f"rope_type={shown(rope_type)} is not allowed: one of {allowed}")
    theta = check_positive("rope_theta", parameters.pop("rope_theta"))
    factor = parameters.pop("partial_rotary_factor", None) or fields.raw("partial_rotary_factor")
    if fields.has("partial_rotary_factor"):
        partial_default = 1.0  # null: the whole head
    share = check_positive("partial_rotary_factor", factor or partial_default) if partial else 1.0
    if share > 1:
        raise ConfigError(f"partial_rotary_factor={share} is not allowed: at most 1")
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(
            f"head_dim={head_dim} gives {rotary_dim} rotary dimensions: an even number ≥ 2"
        )
    if rope_type in FROM_TRAINED_LENGTH:
        _take_trained_length(fields, parameters)
    return RoPE(
        rope_theta=theta,
        rope_type=rope_type,
        rotary_dim=rotary_dim,
        interleaved=interleaved,
        scaling=tuple(sorted((key, _frozen(value)) for key, value in parameters.items())),
    )


def _take_trained_length(fields: Fields, parameters: dict[str, Any]) -> None:
    """`original_max_position_embeddings` of the config itself, else of the parameters, else all.

    transformers 5.23 does so in RotaryEmbeddingConfigMixin.standardize_rope_params.
    """
    name = "original_max_position_embeddings"
    trained = fields.raw(name) or parameters.get(name) or fields.raw("max_position_embeddings")
    if trained is not None:
        parameters[name] = trained


def _frozen(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(f"rope_parameters has {shown(value)}: numbers, words or lists of numbers")


def gqa(sizes: tuple[int, int, int], **extra: Any) -> GQA:
    """Attention of (heads, kv heads, head_dim) as `heads` returns them, scores scaled by 1/√d."""
    H, G, D = sizes
    return GQA(num_attention_heads=H, num_key_value_heads=G, head_dim=D, scaling=D**-0.5, **extra)


def gqa_decoder(
    fields: Fields,
    *,
    stem: str,
    attention: GQA,
    windows: Sequence[int | None],
    feed_forward: Dense | MoE,
    norm: Norm | None = None,
    placement: Placement = "pre",
    positions: Positions | None = None,
    **extra: Any,
) -> Model:
    """A decoder whose blocks are alike but for their window. Default: RMSNorm before, RoPE."""
    norm = norm or rmsnorm(fields)
    layer = Layer(attention=attention, feed_forward=feed_forward, norm=norm, placement=placement)
    return causal_lm(
        fields,
        layers=with_windows(layer, attention, windows),
        final_norm=norm,
        positions=positions or rope(fields, head_dim=attention.head_dim),
        base_class=f"{stem}Model",
        head_class=f"{stem}ForCausalLM",
        **extra,
    )


def with_windows(layer: Layer, attention: GQA, windows: Sequence[int | None]) -> tuple[Layer, ...]:
    """One such layer per window; equal ones are the same object."""
    made = {w: replace(layer, attention=replace(attention, sliding_window=w)) for w in windows}
    return tuple(made[window] for window in windows)


def causal_lm(
    fields: Fields,
    *,
    layers: tuple[Layer, ...],
    final_norm: Norm | None,
    positions: Positions,
    names: tuple[tuple[str, str], ...] = LLAMA_NAMES,
    base_class: str,
    head_class: str,
    max_position_embeddings: int | None = None,
    unbounded: bool = False,
    tied: bool | None = None,
    **extra: Any,
) -> Model:
    """The Model around the blocks. The head is `architectures[0]`; absent: the causal LM.

    `unbounded`: its positions have no end, and no field names one. `tied`: whether the head is the
    embedding, where `tie_word_embeddings` alone does not say.
    """
    limit = None if unbounded else max_position_embeddings
    if limit is None and not unbounded:
        limit = fields.size("max_position_embeddings")
    lm_head = chosen_head(fields, head_class, base_class) == head_class
    return Model(
        hidden_size=fields.size("hidden_size"),
        vocab_size=fields.size("vocab_size"),
        max_position_embeddings=limit,
        layers=layers,
        final_norm=final_norm,
        positions=positions,
        tie_word_embeddings=fields.flag("tie_word_embeddings") if tied is None else tied,
        lm_head=lm_head,
        parameter_names=names if lm_head else rebased(names),
        **extra,
        **about(fields),
    )


def chosen_head(fields: Fields, *classes: str) -> str:
    """The class that `architectures[0]` names, one of `classes`; absent: the first of them."""
    architectures = fields.config.get("architectures") or [classes[0]]
    head = architectures[0] if isinstance(architectures, list) and architectures else architectures
    if head not in classes:
        raise ConfigError(
            f"architectures[0]={shown(head)} is not read yet: one of {', '.join(classes)}"
        )
    return str(head)


def about(fields: Fields, inner: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a Model says of its config itself; to be called when everything else is read.

    `inner`: the config inside it that may name the dtype and the quantisation too.
    """
    name = fields.config.get("_name_or_path") or fields.model_type
    dtype = stated_dtype(fields.config, inner or {})
    if dtype is None:
        dtype = "float32"  # what PreTrainedModel loads in when the config names none
        fields.take_default("dtype", dtype)
    quantization = fields.config.get("quantization_config")
    if quantization is None and inner is not None:
        quantization = inner.get("quantization_config")
    return {
        "name": name if isinstance(name, str) else fields.model_type,
        "model_type": fields.model_type,
        "dtype": from_torch_name(dtype, field="dtype"),
        "quantization": read_quantization(quantization),
        "defaults": fields.defaults,
        "config_json": as_json(fields.config),
    }


def stated_dtype(*configs: Mapping[str, Any]) -> Any:
    """The first dtype that one of the configs names; None where none does."""
    stated = (config.get(name) for config in configs for name in ("dtype", "torch_dtype"))
    return next((dtype for dtype in stated if dtype is not None), None)


def rebased(names: tuple[tuple[str, str], ...], base: str = "") -> tuple[tuple[str, str], ...]:
    """Names of a causal LM's parts with another name of the base module; none: the bare model's."""
    bases = ("model.", "transformer.", "gpt_neox.", "backbone.")
    return tuple(
        (ours, base + theirs.partition(".")[2] if theirs.startswith(bases) else theirs)
        for ours, theirs in names
    )


def as_json(config: Mapping[str, Any]) -> str:
    """The config as it is kept in a Model; ConfigError where it is not plain JSON."""
    try:
        return json.dumps(dict(config), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"config is not plain JSON: {error}") from None
