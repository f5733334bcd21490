"""Readers of glm4_moe_lite, deepseek_v32 and glm_moe_dsa: latent attention, and sparse.

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from planner.errors import ConfigError, check_size, shown
from planner.huggingface.blocks import causal_lm, gated, layer_count, rmsnorm, rope
from planner.huggingface.deepseek import latent_attention, sigmoid_group_mixture
from planner.huggingface.fields import Fields, check_positive
from planner.layers import MLA, Dense, Indexer, Layer, MoE, RoPE
from planner.model import Model

INDEXED = ("indexed_attention", "deepseek_sparse_attention", "qwen_sparse_attention")
"""Words for layers with an indexer; transformers takes the later ones for the first."""


def read_glm4_moe_lite(fields: Fields) -> Model:
    """GLM-4.7-Flash: DeepSeek-V3's blocks; `mlp_layer_types` absent: all but the first are sparse.

    `first_k_dense_replace` is not read by its class; `head_dim` is a name of `qk_rope_head_dim`,
    and counts before it.
    """
    fields.spell(
        n_routed_experts=("num_local_experts", "n_routed_experts"),
        qk_rope_head_dim=("head_dim", "qk_rope_head_dim"),
    )
    no_windows(fields)
    positions = rotary_part(fields, head_dim=fields.size("qk_rope_head_dim"))
    attention = replace(
        latent_attention(fields, positions), rope_interleave=fields.flag("rope_interleave")
    )
    kinds = layer_words(fields, "mlp_layer_types", ("dense", "sparse"), longer=True)
    if kinds is None:
        kinds = ["dense"] + ["sparse"] * (layer_count(fields) - 1)
    return latent_decoder(
        fields,
        stem="Glm4MoeLite",
        attentions=[attention] * len(kinds),
        sparse=[kind == "sparse" for kind in kinds],
        mixture=grouped_mixture(fields),
        positions=positions,
    )


def read_deepseek_v32(fields: Fields) -> Model:
    """DeepSeek-V3.2: V3's blocks, every layer with an indexer; the query always has a latent."""
    return _sparse_decoder(
        fields, stem="DeepseekV32", indexed=[True] * layer_count(fields), interleave=False
    )


def read_glm_moe_dsa(fields: Fields) -> Model:
    """GLM-5: DeepSeek-V3.2's blocks; layers with a "shared" indexer take the last layer's picks."""
    return _sparse_decoder(
        fields, stem="GlmMoeDsa", indexed=indexed_layers(fields), interleave=True
    )


def _sparse_decoder(
    fields: Fields, *, stem: str, indexed: Sequence[bool], interleave: bool
) -> Model:
    spell_experts(fields)
    all_indexed(fields)
    fields.size("q_lora_rank")
    D_rope = fields.size("qk_rope_head_dim")
    positions = rotary_part(fields, head_dim=D_rope, default_is_whole=True)
    attention = latent_attention(fields, positions)
    own = replace(attention, indexer=indexer(fields, rotary_dim=D_rope))
    return latent_decoder(
        fields,
        stem=stem,
        attentions=[own if has else attention for has in indexed],
        sparse=sparse_after_dense(fields),
        mixture=grouped_mixture(fields),
        positions=replace(positions, interleaved=interleave),
    )


def latent_decoder(
    fields: Fields,
    *,
    stem: str,
    attentions: Sequence[MLA],
    sparse: Sequence[bool],
    mixture: MoE,
    positions: RoPE,
    **extra: Any,
) -> Model:
    """A decoder from the attention of every layer and where it is a mixture."""
    norm, dense = rmsnorm(fields), gated(fields)
    made: dict[tuple[MLA, bool], Layer] = {}
    for attention, mixed in zip(attentions, sparse, strict=True):
        feed_forward: Dense | MoE = mixture if mixed else dense
        made.setdefault(
            (attention, mixed), Layer(attention=attention, feed_forward=feed_forward, norm=norm)
        )
    return causal_lm(
        fields,
        layers=tuple(made[key] for key in zip(attentions, sparse, strict=True)),
        final_norm=norm,
        positions=positions,
        base_class=f"{stem}Model",
        head_class=f"{stem}ForCausalLM",
        **extra,
    )


def grouped_mixture(fields: Fields) -> MoE:
    """DeepSeek-V3's mixture; heads and groups are such that its class runs."""
    H, G = fields.size("num_attention_heads"), fields.size("num_key_value_heads")
    if H // G != 1:
        raise ConfigError(f"num_key_value_heads={G} is not allowed: num_attention_heads={H}")
    return sigmoid_group_mixture(fields)


def spell_experts(fields: Fields) -> None:
    """The later classes take `num_experts` too, unless it is null."""
    names = ["num_local_experts", "n_routed_experts"]
    if fields.config.get("num_experts") is not None:
        names.insert(1, "num_experts")
    fields.spell(n_routed_experts=tuple(names))


def all_indexed(fields: Fields) -> None:
    """ConfigError for `layer_types` whose caches hold no keys of an indexer."""
    layer_words(fields, "layer_types", INDEXED)


def indexer(fields: Fields, *, rotary_dim: int, pool: int | None = None, **extra: bool) -> Indexer:
    """The indexer, whose heads turn as far as those of the attention."""
    made = Indexer(
        index_kpool=pool,
        index_n_heads=fields.size("index_n_heads"),
        index_head_dim=fields.size("index_head_dim"),
        index_topk=fields.size("index_topk"),
        **extra,
    )
    if made.index_head_dim < rotary_dim:
        raise ConfigError(
            f"index_head_dim={made.index_head_dim} is less than qk_rope_head_dim={rotary_dim}"
        )
    return made


def indexed_layers(fields: Fields, *, first_is_full: bool = True) -> list[bool]:
    """Whether a layer has an indexer of its own: `indexer_types`, a pattern, or every n-th."""
    L = layer_count(fields)
    kinds = layer_words(fields, "indexer_types", ("full", "shared"), longer=True)
    pattern = fields.config.get("index_topk_pattern")
    if kinds is None and pattern is not None:
        words = pattern
        if isinstance(pattern, str):
            words = [{"F": "full", "S": "shared"}.get(letter, letter) for letter in pattern]
        spelled = Fields({**fields.config, "index_topk_pattern": words}, fields.model_type)
        kinds = layer_words(spelled, "index_topk_pattern", ("full", "shared"), longer=True)
    if kinds is None:
        every = check_size("index_topk_freq", fields.config.get("index_topk_freq", 1), minimum=0)
        offset = check_size(
            "index_skip_topk_offset", fields.config.get("index_skip_topk_offset", 2), minimum=0
        )
        kinds = ["shared" if max(i - offset + 1, 0) % max(every, 1) else "full" for i in range(L)]
    if first_is_full and kinds[0] != "full":
        raise ConfigError("indexer_types[0]='shared' is not allowed: the first layer is full")
    return [kind == "full" for kind in kinds]


def sparse_after_dense(fields: Fields) -> list[bool]:
    """Where mixtures stand: `mlp_layer_types`, or all but the first `first_k_dense_replace`."""
    kinds = layer_words(fields, "mlp_layer_types", ("dense", "sparse"))
    if kinds is not None:
        return [kind == "sparse" for kind in kinds]
    first = fields.size("first_k_dense_replace", minimum=0)
    return [i >= first for i in range(layer_count(fields))]


def layer_words(
    fields: Fields, name: str, allowed: Sequence[str], *, longer: bool = False
) -> list[str] | None:
    """A word for each layer, None where the field is null; `longer`: more of them do no harm."""
    words, L = fields.raw(name), layer_count(fields)
    if words is None:
        return None
    if not isinstance(words, list) or len(words) < L or (len(words) > L and not longer):
        raise ConfigError(f"{name}={shown(words)} is not allowed: a list of {L} words")
    for word in words:
        if word not in allowed:
            raise ConfigError(f"{name} has {shown(word)}: one of {', '.join(allowed)}")
    return words[:L]


def rotary_part(fields: Fields, *, head_dim: int, default_is_whole: bool = False) -> RoPE:
    """Positions of the rotary part of a head, which turns as a whole.

    `default_is_whole`: unscaled positions do not read `partial_rotary_factor`.
    """
    parameters = fields.rope_parameters()
    check_factor(parameters)
    share = parameters.get("partial_rotary_factor", fields.raw("partial_rotary_factor"))
    if default_is_whole and parameters["rope_type"] == "default":
        share = None
    if share is not None and share != 1:
        raise ConfigError(
            f"partial_rotary_factor={shown(share)} is not allowed: 1, for the rotary part of a head"
        )
    return rope(fields, head_dim=head_dim)


def check_factor(parameters: dict[str, Any]) -> None:
    """ConfigError for scaled positions without the factor that they are scaled by."""
    if parameters["rope_type"] in ("linear", "dynamic", "yarn", "llama3"):
        check_positive("rope_parameters.factor", parameters.get("factor"))


def no_windows(fields: Fields) -> None:
    """ConfigError for a window that clips the latent cache and masks nothing."""
    for name in ("sliding_window", "attention_chunk_size"):
        if fields.raw(name) is not None:
            raise ConfigError(f"{name}={shown(fields.raw(name))} is not allowed: null")
    layer_words(fields, "layer_types", ("full_attention",))


READERS: dict[str, Callable[[Fields], Model]] = {
    "deepseek_v32": read_deepseek_v32,
    "glm4_moe_lite": read_glm4_moe_lite,
    "glm_moe_dsa": read_glm_moe_dsa,
}
