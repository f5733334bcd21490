"""Reader of deepseek_v4 (transformers 5.23, models/deepseek_v4/)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from planner.errors import ConfigError, check_size, shown
from planner.huggingface.blocks import (
    LLAMA_NAMES,
    activation,
    causal_lm,
    layer_count,
    rmsnorm,
    rope,
)
from planner.huggingface.fields import Fields, check_positive
from planner.huggingface.sparse_latent import check_factor, layer_words
from planner.layers import Dense, Indexer, Layer, MoE, RoPE
from planner.mixers.sparse import Compressed
from planner.model import Model
from planner.tensors import Group, Parameter, tensor

SLIDING = "sliding_attention"
SPARSE = "compressed_sparse_attention"
HEAVY = "heavily_compressed_attention"
BY_RATIO = {0: SLIDING, 4: SPARSE, 128: HEAVY}
"""What the `compress_ratios` of the published configs mean."""

DEFAULT_RATES = {SPARSE: 4, HEAVY: 128}
ROTARY_SHARE = 64 / 512


def read_deepseek_v4(fields: Fields) -> Model:
    """DeepSeek-V4: keys that are values, a window and compressed entries, hyper-connections.

    Every layer is a mixture; the first ones pick experts by the token's number from a table, which
    is no parameter. Its class reads neither num_key_value_heads nor n_shared_experts (it is one).
    """
    fields.spell(
        n_routed_experts=("num_local_experts", "n_routed_experts"),
        moe_intermediate_size=("intermediate_size", "moe_intermediate_size"),
    )
    fields.choice("scoring_func", ("sqrtsoftplus", "sigmoid"))
    _check_mixtures(fields)
    main, compress = _positions(fields)
    norm, streams = rmsnorm(fields), fields.size("hc_mult")
    h, moe = fields.size("hidden_size"), _mixture(fields)
    mixers = _mixers(fields, compress)
    made = {
        mixer: Layer(
            attention=mixer,
            feed_forward=moe,
            norm=norm,
            extra_parameters=(
                *hyper_connection("attn_hc", "attention", streams, h),
                *hyper_connection("ffn_hc", "feed_forward", streams, h),
            ),
        )
        for mixer in set(mixers)
    }
    return causal_lm(
        fields,
        layers=tuple(made[mixer] for mixer in mixers),
        final_norm=norm,
        positions=compress,
        local_positions=main,
        names=(*LLAMA_NAMES, ("hc_head", "model.hc_head")),
        base_class="DeepseekV4Model",
        head_class="DeepseekV4ForCausalLM",
        extra_parameters=(
            tensor("hc_head.hc_fn", streams, streams * h, group="head"),
            tensor("hc_head.hc_base", streams, group="head"),
            tensor("hc_head.hc_scale", 1, group="head"),
        ),
    )


def hyper_connection(name: str, group: Group, streams: int, h: int) -> tuple[Parameter, ...]:
    """Weights that mix n residual streams into one input and its output into n streams.

    n in, n out and n · n among themselves, each kind with a scale (mHC, arXiv:2512.24880).
    """
    n = streams
    return (
        tensor(f"{name}.fn", (2 + n) * n, n * h, group=group),
        tensor(f"{name}.base", (2 + n) * n, group=group),
        tensor(f"{name}.scale", 3, group=group),
    )


def _mixture(fields: Fields) -> MoE:
    act, width = activation(fields), fields.size("moe_intermediate_size")
    return MoE(
        num_experts=fields.size("n_routed_experts"),
        num_experts_per_tok=fields.size("num_experts_per_tok"),
        moe_intermediate_size=width,
        activation=act,
        router="sigmoid-groups",  # one group, and √softplus in the sigmoid's place
        shared=Dense(
            intermediate_size=width, activation=act, gated=True, bias=fields.flag("mlp_bias")
        ),
        swiglu_limit=fields.number("swiglu_limit"),
        routed_scaling_factor=fields.number("routed_scaling_factor"),
    )


def _check_mixtures(fields: Fields) -> None:
    """Both kinds of `mlp_layer_types` are the same size; only words that do not exist matter."""
    layer_words(fields, "mlp_layer_types", ("hash_moe", "moe"), longer=True)
    first = fields.config.get("num_hash_layers")
    if first is not None:
        check_size("num_hash_layers", first, minimum=0)


def _mixers(fields: Fields, compress: RoPE) -> list[Compressed]:
    kinds, rates = _kinds(fields), _rates(fields)
    indexer = Indexer(
        index_n_heads=fields.size("index_n_heads"),
        index_head_dim=fields.size("index_head_dim"),
        index_topk=fields.size("index_topk"),
    )
    if SPARSE in kinds and indexer.index_head_dim < compress.rotary_dim:
        raise ConfigError(
            f"index_head_dim={indexer.index_head_dim} is less than the {compress.rotary_dim} "
            "rotary dimensions of a head"
        )

    def mixer(kind: str) -> Compressed:
        rate = None
        if kind != SLIDING:
            check_size(f"compress_rates.{HEAVY}", rates.get(HEAVY))  # CSA's cache reads it too
            rate = check_size(f"compress_rates.{kind}", rates.get(kind))
        return Compressed(
            num_attention_heads=fields.size("num_attention_heads"),
            head_dim=fields.size("head_dim"),
            q_lora_rank=fields.size("q_lora_rank"),
            o_groups=fields.size("o_groups"),
            o_lora_rank=fields.size("o_lora_rank"),
            sliding_window=fields.size("sliding_window"),
            compress_rate=rate,
            indexer=indexer if kind == SPARSE else None,
        )

    made = {kind: mixer(kind) for kind in sorted(set(kinds))}
    return [made[kind] for kind in kinds]


def _kinds(fields: Fields) -> list[str]:
    """The attention of every layer: `layer_types`, `compress_ratios`, or two HCA and a turn."""
    L, kinds = (
        layer_count(fields),
        layer_words(fields, "layer_types", tuple(BY_RATIO.values()), longer=True),
    )
    ratios = fields.config.get("compress_ratios")
    if kinds is None and ratios is not None:
        if not isinstance(ratios, list) or len(ratios) < L:
            raise ConfigError(f"compress_ratios={shown(ratios)} is not allowed: a list of {L}")
        for ratio in ratios:
            if type(ratio) is not int or ratio not in BY_RATIO:
                raise ConfigError(f"compress_ratios has {shown(ratio)}: one of 0, 4, 128")
        kinds = [BY_RATIO[ratio] for ratio in ratios[:L]]
    if kinds is None:
        kinds = [SPARSE if i % 2 and i > 1 else HEAVY for i in range(L)]
    return kinds


def _rates(fields: Fields) -> dict[str, Any]:
    given = fields.raw("compress_rates")
    if given is not None and not isinstance(given, dict):
        raise ConfigError(f"compress_rates={shown(given)} is not allowed: an object or null")
    rates = dict(DEFAULT_RATES if given is None else given)
    for kind, name in ((SPARSE, "compress_rate_csa"), (HEAVY, "compress_rate_hca")):
        if fields.config.get(name) is not None:
            rates[kind] = fields.config[name]
    return rates


def _positions(fields: Fields) -> tuple[RoPE, RoPE]:
    """(of sliding layers, of compressing ones): the second have a base and scaling of their own."""
    D, share = fields.size("head_dim"), fields.optional_number("partial_rotary_factor")
    given = fields.raw("rope_scaling") or fields.raw("rope_parameters") or {}
    if not isinstance(given, dict):
        raise ConfigError(f"rope_parameters={shown(given)} is not allowed: an object or null")
    main, compress = given.get("main"), given.get("compress")
    if isinstance(main, dict) and isinstance(compress, dict):
        kinds = []
        for name, own in (("main", main), ("compress", compress)):
            factor = own.get("partial_rotary_factor", share)
            check_positive(f"rope_parameters.{name}.partial_rotary_factor", factor)
            base = {"rope_theta": fields.number("rope_theta")}
            kinds.append({**base, **own, "partial_rotary_factor": factor})
    else:
        legacy = fields.config.get("qk_rope_head_dim")
        if share is None:
            share = ROTARY_SHARE
            if legacy is not None:
                share = check_size("qk_rope_head_dim", legacy) / D
        flat = {k: v for k, v in given.items() if k not in ("main", "compress")}
        kinds = [
            {"rope_theta": fields.number("rope_theta")},
            {**flat, "rope_theta": fields.number("compress_rope_theta")},
        ]
        kinds = [{**kind, "partial_rotary_factor": share} for kind in kinds]
    made = []
    for parameters in kinds:
        config = {**fields.config, "rope_parameters": parameters, "rope_scaling": None}
        inner = Fields(config, fields.model_type)
        check_factor(inner.rope_parameters())
        made.append(rope(inner, head_dim=D, partial=True, interleaved=True))
    return made[0], made[1]


READERS: dict[str, Callable[[Fields], Model]] = {
    "deepseek_v4": read_deepseek_v4,
}
