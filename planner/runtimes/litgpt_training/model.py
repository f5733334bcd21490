"""A model as lit-gpt builds it (lit_gpt/config.py, model.py); refused where it has no class.

Hugging Face's names are kept: `q_proj`, `k_proj`, `v_proj` are the rows of its one matrix `attn`,
`up_proj` is `fc`, or with `gate_proj` (`fc_1`) `fc_2`. Embedding and head are two tensors there,
however a checkpoint ties them; the vocabulary is as large as the checkpoint's.
"""

from __future__ import annotations

from dataclasses import replace

from planner.errors import ConfigError
from planner.layers import GQA, Dense, Layer, Norm, RoPE
from planner.model import Model

TYPES = ("falcon", "gpt_neox", "llama", "mistral", "phi", "stablelm")
"""Model types whose checkpoints it converts (scripts/convert_hf_checkpoint.py)."""
PLACEMENTS = ("pre", "parallel", "parallel-two")


def as_litgpt(model: Model, sequence_tokens: int) -> Model:
    """The model with its positions set to the longest sample: `model.max_seq_length = …`."""
    if model.model_type not in TYPES:
        raise ConfigError(
            f"model_type={model.model_type} is not planned for runtime=litgpt: {', '.join(TYPES)}"
        )
    if not isinstance(model.positions, RoPE) or not model.lm_head:
        raise ConfigError(
            f"this {model.model_type} is none of lit-gpt's: rotary positions and a head for words"
        )
    kinds = {layer: _layer(model, layer) for layer in model.layer_kinds()}
    return replace(
        model,
        layers=tuple(kinds[layer] for layer in model.layers),
        tie_word_embeddings=False,
        max_position_embeddings=sequence_tokens,
    )


def _layer(model: Model, layer: Layer) -> Layer:
    gqa, dense, norm = layer.attention, layer.feed_forward, layer.norm
    if not isinstance(gqa, GQA) or not isinstance(dense, Dense):
        raise ConfigError(
            f"runtime=litgpt does not plan the layers of model_type={model.model_type}"
        )
    width = gqa.num_attention_heads * gqa.head_dim
    refused = {
        "norms on queries and keys": gqa.qk_norm is not None,
        f"heads of {width} in all beside hidden_size={model.hidden_size}": width
        != model.hidden_size,
        "biases on some of its linear layers alone": len({gqa.qkv_bias, gqa.o_bias, dense.bias})
        > 1,
        f"norms that stand {layer.placement}": layer.placement not in PLACEMENTS,
        "norms without weights": not _has_class(norm),
        f"the activation {dense.activation}": not dense.activation.startswith(
            "silu" if dense.gated else "gelu"
        ),
        "scaled residuals": layer.residual_multiplier is not None,
    }
    for what, is_refused in refused.items():
        if is_refused:
            raise ConfigError(f"this {model.model_type} has {what}: lit-gpt has no class for it")
    plain = GQA(
        num_attention_heads=gqa.num_attention_heads,
        num_key_value_heads=gqa.num_key_value_heads,
        head_dim=gqa.head_dim,
        scaling=gqa.scaling,
        qkv_bias=gqa.qkv_bias,
        o_bias=gqa.o_bias,
    )
    return replace(layer, attention=plain, feed_forward=replace(dense, fused_gate_up=False))


def _has_class(norm: Norm) -> bool:
    """nn.LayerNorm with a bias, or RMSNorm."""
    return norm.weight and not norm.plus_one and norm.bias == (norm.kind == "layernorm")
