"""What one of several tensor-parallel GPUs caches; all of them cache the same.

vLLM 0.19.1: ModelConfig.get_num_kv_heads (config/model.py), QKVParallelLinear (layers/linear.py)
and MambaStateShapeCalculator (layers/mamba/mamba_utils.py).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.errors import ConfigError
from planner.layers import GQA, MLA, Layer
from planner.mixers.linear import GatedDeltaNet, KimiDelta, LightningAttention
from planner.mixers.mamba import Mamba, Mamba2
from planner.mixers.recurrent import SharedAttention, ShortConv
from planner.model import Model


def rank(model: Model, tensor_parallel: int) -> Model:
    """`model` with the heads and channels of one of `tensor_parallel` GPUs in its token mixers.

    Query heads must divide. Of fewer key/value heads than GPUs each GPU keeps one, a copy; else
    they must divide too. A latent has no heads: whole on every GPU. States go by heads or channels.
    """
    if tensor_parallel == 1 or not model.is_decoder:
        return model
    kinds = {layer: _layer(layer, tensor_parallel) for layer in model.layer_kinds()}
    return replace(model, layers=tuple(kinds[layer] for layer in model.layers))


def _layer(layer: Layer, tp: int) -> Layer:
    return replace(
        layer,
        attention=_part(layer.attention, tp),
        beside=_part(layer.beside, tp),
        cross_attention=_part(layer.cross_attention, tp),
    )


def _part(mixer: Any, tp: int) -> Any:
    """The share of one GPU in a token mixer."""

    def divided(*fields: str) -> Any:
        return replace(mixer, **{name: _share(name, getattr(mixer, name), tp) for name in fields})

    match mixer:
        case GQA(num_key_value_heads=G):
            share = _share("num_attention_heads", mixer.num_attention_heads, tp)
            return replace(mixer, num_attention_heads=share, num_key_value_heads=_kv_share(G, tp))
        case SharedAttention(num_key_value_heads=G):
            return replace(mixer, num_key_value_heads=_kv_share(G, tp))
        case MLA() | LightningAttention():
            return divided("num_attention_heads")
        case Mamba():
            return divided("intermediate_size")
        case Mamba2(n_groups=groups):
            # groups that do not divide are copied until each GPU has one
            return replace(divided("num_heads"), n_groups=max(1, groups // tp))
        case GatedDeltaNet():
            return divided("linear_num_key_heads", "linear_num_value_heads")
        case KimiDelta():
            return divided("linear_num_heads")
        case ShortConv():
            return divided("hidden_size")
        case _:  # nothing, or what layer_specs refuses
            return mixer


def _kv_share(heads: int, tp: int) -> int:
    """Key/value heads of one GPU: max(1, H_kv / tp)."""
    if heads % tp and tp % heads:
        raise ConfigError(
            f"num_key_value_heads={heads} and tensor_parallel={tp} do not divide one another: "
            "vLLM asks for it"
        )
    return max(1, heads // tp)


def _share(field: str, count: int, tp: int) -> int:
    if count % tp:
        raise ConfigError(
            f"{field}={count} is not a multiple of tensor_parallel={tp}: vLLM asks for it"
        )
    return count // tp
