"""Readers of ministral3 and mistral4, whose queries grow with position (transformers 5.23)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.errors import ConfigError, shown
from planner.huggingface.blocks import gated, gqa, gqa_decoder, layer_count, layer_windows, rope
from planner.huggingface.deepseek import latent_attention
from planner.huggingface.fields import Fields, check_positive
from planner.huggingface.later_decoders import stated_heads
from planner.huggingface.sparse_latent import (
    check_factor,
    grouped_mixture,
    latent_decoder,
    no_windows,
)
from planner.model import Model


def read_ministral3(fields: Fields) -> Model:
    """Ministral-3: mistral's blocks, queries that grow with their position, YaRN by default."""
    sizes = stated_heads(fields)
    scaled = scaled_queries(fields, theta=1_000_000.0, factor=16.0, original=16384)
    return gqa_decoder(
        fields,
        stem="Ministral3",
        attention=gqa(sizes),
        windows=layer_windows(fields, window=fields.optional_size("sliding_window")),
        feed_forward=gated(fields),
        positions=rope(scaled, head_dim=sizes[2]),
    )


def read_mistral4(fields: Fields) -> Model:
    """Mistral-4: DeepSeek-V3's attention and a softmax router; the query grows with its position.

    Rotary frequencies are those of a whole head, of which YaRN takes the rotary part; without
    rope_parameters the class has YaRN of its own.
    """
    fields.spell(n_routed_experts=("num_local_experts", "n_routed_experts"))
    if fields.raw("num_key_value_heads") is None:
        fields.spell(num_key_value_heads=("num_attention_heads",))
    no_windows(fields)
    D_nope, D_rope = fields.size("qk_nope_head_dim"), fields.size("qk_rope_head_dim")
    D, share = D_nope + D_rope, D_rope / (D_nope + D_rope)
    scaled = scaled_queries(fields, theta=10_000.0, factor=128.0, original=8192)
    if fields.has("head_dim"):
        D = fields.size("head_dim")
    positions = rope(scaled, head_dim=D_rope)
    parameters = scaled.rope_parameters()
    if parameters["rope_type"] != "default":
        given = parameters.get("partial_rotary_factor")
        if given is None:  # only beside the older rope_scaling does the field count
            older = fields.raw("partial_rotary_factor") or 1.0
            given = older if fields.raw("rope_scaling") else share
        D = int(D * check_positive("partial_rotary_factor", given))
    if D_rope != D:
        raise ConfigError(
            f"rope_parameters give {D} rotary dimensions: qk_rope_head_dim={D_rope} of them"
        )
    attention = replace(
        latent_attention(fields, positions), rope_interleave=fields.flag("rope_interleave")
    )
    first = fields.size("first_k_dense_replace", minimum=0)
    L = layer_count(fields)
    return latent_decoder(
        fields,
        stem="Mistral4",
        attentions=[attention] * L,
        sparse=[i >= first for i in range(L)],
        mixture=replace(grouped_mixture(fields), router="softmax"),
        positions=positions,
    )


def scaled_queries(fields: Fields, *, theta: float, factor: float, original: int) -> Fields:
    """The fields with the class's YaRN where they have none.

    Queries are multiplied by 1 + β · ln(1 + ⌊position / original⌋), so both have to be there.
    """
    config = {**fields.config}
    if not fields.raw("rope_scaling") and fields.raw("rope_parameters") is None:
        fields.take_default("rope_type", "yarn")
        config["rope_parameters"] = {
            "rope_type": "yarn",
            "rope_theta": theta,
            "factor": factor,
            "original_max_position_embeddings": original,
            "max_position_embeddings": fields.size("max_position_embeddings"),
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    made = Fields(config, fields.model_type)
    parameters = made.rope_parameters()
    name = "original_max_position_embeddings"
    if parameters["rope_type"] not in ("llama3", "yarn", "longrope") or name in parameters:
        check_positive(f"rope_parameters.{name}", parameters.get(name))
    beta = parameters.get("llama_4_scaling_beta")
    if isinstance(beta, bool) or not isinstance(beta, int | float):
        raise ConfigError(
            f"rope_parameters.llama_4_scaling_beta={shown(beta)} is not allowed: a number"
        )
    check_factor(parameters)
    return made


READERS: dict[str, Callable[[Fields], Model]] = {
    "ministral3": read_ministral3,
    "mistral4": read_mistral4,
}
