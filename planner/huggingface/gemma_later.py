"""Readers of gemma3n, and what gemma4 shares with it: shared caches, embeddings for each layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from planner.errors import ConfigError, check_size, shown
from planner.huggingface.blocks import (
    LLAMA_NAMES,
    activation,
    causal_lm,
    heads,
    layer_count,
    rmsnorm,
)
from planner.huggingface.fields import Fields
from planner.huggingface.mixed import required_kv_heads, rope_by_kind
from planner.layers import GQA, Dense, Layer, Norm, QKNorm
from planner.model import Model
from planner.parameters import norm_parameters
from planner.tensors import Parameter, linear, tensor

FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA_NAMES = (
    *LLAMA_NAMES,
    *(
        (name, f"model.{name}")
        for name in (
            "embed_tokens_per_layer",
            "per_layer_model_projection",
            "per_layer_projection_norm",
            "altup_projections",
            "altup_unembed_projections",
        )
    ),
)


def layer_kinds(fields: Fields, *, every: int) -> list[str]:
    """`layer_types`, full or sliding; absent: each `every`-th layer is full, the others slide."""
    L = layer_count(fields)
    given = fields.raw("layer_types")
    if given is None:
        return [SLIDING if (i + 1) % every else FULL for i in range(L)]
    if not isinstance(given, list) or len(given) != L:
        raise ConfigError(f"layer_types={shown(given)} is not allowed: a list of {L} words")
    for kind in given:
        if kind not in (FULL, SLIDING):
            raise ConfigError(f"layer_types has {shown(kind)}: one of {FULL}, {SLIDING}")
    return list(given)


def sharing_layers(fields: Fields, kinds: Sequence[str]) -> list[bool]:
    """Whether each layer takes keys and values from the last layer of its kind that has its own.

    The last `num_kv_shared_layers` do (`kv_sharing_modes` of the config classes).
    """
    name = "num_kv_shared_layers"
    shared = fields.size(name, minimum=0)
    own = kinds[: len(kinds) - shared] if shared < len(kinds) else []
    orphans = sorted(set(kinds) - set(own)) if shared else []
    if orphans:
        raise ConfigError(
            f"{name}={shared} is not allowed: of {len(kinds)} layers, no earlier one of "
            f"{', '.join(orphans)} keeps keys and values"
        )
    return [i >= len(own) if shared else False for i in range(len(kinds))]


def check_padding(fields: Fields, *tables: str) -> None:
    """ConfigError where `pad_token_id` is no row of an embedding: torch refuses to build that."""
    row = fields.config.get("pad_token_id")
    if row is None:
        return
    smallest = min(fields.size(name) for name in tables)
    check_size("pad_token_id", row, minimum=-smallest, maximum=smallest - 1)


def per_layer_inputs(h: int, p: int, norm: Norm) -> Iterator[Parameter]:
    """What a block does with its own `p` numbers of each token: gate, project back, norm."""
    yield from linear("per_layer_input_gate", "feed_forward", out=p, into=h, bias=False)
    yield from linear("per_layer_projection", "feed_forward", out=h, into=p, bias=False)
    yield from norm_parameters(norm, "post_per_layer_input_norm", h)


def per_layer_embeddings(fields: Fields, p: int, norm: Norm) -> Iterator[Parameter]:
    """The table of `p` numbers for each token and each layer, and their part from the embedding."""
    h, width = fields.size("hidden_size"), layer_count(fields) * p
    rows = fields.size("vocab_size_per_layer_input")
    yield tensor("embed_tokens_per_layer.weight", rows, width, group="embedding")
    yield from linear("per_layer_model_projection", "embedding", out=width, into=h, bias=False)
    yield from norm_parameters(norm, "per_layer_projection_norm", p)


def _widths(fields: Fields) -> list[int]:
    """`intermediate_size` of every layer: one for all, or a list."""
    L, name = layer_count(fields), "intermediate_size"
    given = fields.raw(name)
    if not isinstance(given, list):
        return [fields.size(name)] * L
    if len(given) != L:
        raise ConfigError(f"{name}={shown(given)} is not allowed: one size, or a list of {L}")
    return [check_size(name, width) for width in given]


def _check_sparsity(fields: Fields) -> None:
    """The share of a gate's outputs that a layer zeroes: work and memory stay those of all."""
    name, given = "activation_sparsity_pattern", fields.raw("activation_sparsity_pattern")
    if given is None:
        return
    L = layer_count(fields)
    if not isinstance(given, list) or len(given) != L:
        raise ConfigError(f"{name}={shown(given)} is not allowed: a list of {L} shares")
    for share in given:
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ConfigError(f"{name} has {shown(share)}: a share from 0 to below 1")


def _check_rope(fields: Fields) -> None:
    """ConfigError for a part of a head: scaled frequencies would be shorter than the head."""
    given = fields.raw("rope_parameters")
    parts = [fields.raw("rope_scaling"), *(given.values() if isinstance(given, dict) else ())]
    for part in parts:
        if isinstance(part, dict) and part.get("partial_rotary_factor") not in (None, 1):
            raise ConfigError(
                f"partial_rotary_factor={shown(part['partial_rotary_factor'])} is not allowed: 1"
            )


def _altup(fields: Fields, n: int, h: int) -> Iterator[Parameter]:
    """Alternating updates: a block predicts `n` streams, runs on one and corrects the others."""
    fields.number("altup_coef_clip")
    fields.flag("altup_correct_scale")
    for name, out, into in (
        ("correction_coefs", n, n),
        ("prediction_coefs", n * n, n),
        ("modality_router", n, h),
    ):
        yield from linear(f"altup.{name}", "feed_forward", out=out, into=into, bias=False)
    yield from norm_parameters(rmsnorm(fields), "altup.router_norm", h)
    yield tensor("altup.correct_output_scale", h, group="feed_forward")


def _laurel(fields: Fields, h: int) -> Iterator[Parameter]:
    """A residual of low rank beside the attention."""
    r = fields.size("laurel_rank", minimum=0)
    yield from linear("laurel.linear_left", "feed_forward", out=r, into=h, bias=False)
    yield from linear("laurel.linear_right", "feed_forward", out=h, into=r, bias=False)
    yield from norm_parameters(rmsnorm(fields), "laurel.post_laurel_norm", h)


def _streams(n: int, h: int) -> Iterator[Parameter]:
    """From the embedding to the other streams, and back before the last norm."""
    for i in range(n - 1):
        yield from linear(f"altup_projections.{i}", "embedding", out=h, into=h, bias=False)
        yield from linear(f"altup_unembed_projections.{i}", "head", out=h, into=h, bias=False)


def _gemma3n_attention(fields: Fields) -> dict[str, Any]:
    required_kv_heads(fields)
    fields.size("head_dim")
    H, G, D = heads(fields, divisible_hidden=True)
    bias = fields.flag("attention_bias")
    return {
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "head_dim": D,
        "scaling": 1.0,
        "qkv_bias": bias,
        "o_bias": bias,
        "qk_norm": QKNorm(norm=rmsnorm(fields), width="head"),
        "v_norm": True,
    }


def read_gemma3n_text(fields: Fields) -> Model:
    """Gemma-3n: four residual streams (AltUp), LAuReL, embeddings of their own for every layer.

    The last `num_kv_shared_layers` layers have no keys and values of their own.
    """
    if fields.raw("per_layer_config") not in (None, {}):
        raise ConfigError("per_layer_config is not read for gemma3n_text: leave it out")
    h, norm = fields.size("hidden_size"), rmsnorm(fields)
    p = fields.size("hidden_size_per_layer_input", minimum=0)
    n = fields.size("altup_num_inputs", maximum=1024)
    check_size("altup_active_idx", fields.raw("altup_active_idx"), minimum=-n, maximum=n - 1)
    check_padding(fields, "vocab_size", "vocab_size_per_layer_input")
    _check_sparsity(fields)
    _check_rope(fields)
    kinds = layer_kinds(fields, every=5)
    windows = {FULL: None, SLIDING: fields.size("sliding_window")}
    base, act = _gemma3n_attention(fields), activation(fields, "hidden_activation")
    extra = (*_altup(fields, n, h), *_laurel(fields, h), *per_layer_inputs(h, p, norm))
    made: dict[tuple[str, bool, int], Layer] = {}
    layers = []
    for key in zip(kinds, sharing_layers(fields, kinds), _widths(fields), strict=True):
        kind, shares, width = key
        if key not in made:
            made[key] = Layer(
                attention=GQA(**base, sliding_window=windows[kind], shares_cache=shares),
                feed_forward=Dense(intermediate_size=width, activation=act, gated=True),
                norm=norm,
                placement="sandwich",
                extra_parameters=extra,
            )
        layers.append(made[key])
    everywhere, local = rope_by_kind(
        fields,
        head_dim=base["head_dim"],
        thetas={
            FULL: ("rope_theta", 1_000_000.0),
            SLIDING: ("rope_local_base_freq", 10_000.0),
        },
    )
    return causal_lm(
        fields,
        layers=tuple(layers),
        final_norm=norm,
        positions=everywhere,
        local_positions=local,
        names=GEMMA_NAMES,
        base_class="Gemma3nTextModel",
        head_class="Gemma3nForCausalLM",
        extra_parameters=(*per_layer_embeddings(fields, p, norm), *_streams(n, h)),
        embedding_scale=h**0.5,
        final_logit_softcapping=fields.number("final_logit_softcapping"),
    )


def read_gemma3n(fields: Fields) -> Model:
    """Gemma-3n with vision and audio: refused, its vision tower is not a class of transformers."""
    vision = fields.config.get("vision_config")
    name = vision.get("architecture") if isinstance(vision, dict) else None
    raise ConfigError(
        f"vision_config.architecture={shown(name or 'mobilenetv5_300m_enc')} of gemma3n is not "
        "read: the timm package builds it; its text_config (gemma3n_text) is read alone"
    )


READERS = {"gemma3n": read_gemma3n, "gemma3n_text": read_gemma3n_text}
