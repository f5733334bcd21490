"""Readers of deberta and deberta-v2: BERT with attention to relative distances.

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`). A table
of distances stands beside the blocks; their linears `pos_…` project it into keys and queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.errors import ConfigError, check_size, shown
from planner.huggingface.bert_like import bert_layer, bert_names, cls_predictions, labelled
from planner.huggingface.blocks import layer_count, layernorm
from planner.huggingface.fields import Fields
from planner.huggingface.heads import Head, Names, dense, described, named_class, padding
from planner.layers import GQA, Layer, LearnedPositions, NoPositions, Norm, Positions, RelativeBias
from planner.model import Model
from planner.parameters import norm_parameters
from planner.tensors import Parameter, linear, tensor

ENDINGS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
V2_ENDINGS = (*ENDINGS, "ForMultipleChoice")
ATTENTION_NAMES: Names = (
    ("self_attn.qkv_proj", "attention.self.in_proj"),
    *((f"self_attn.{x[0]}_proj", f"attention.self.{x}_proj") for x in ("query", "key", "value")),
)


def read_deberta(fields: Fields) -> Model:
    """DeBERTa: one matrix without bias for q, k and v; q and v have biases of their own."""
    ending = named_class(fields, "Deberta", ENDINGS)
    norm, h, H = layernorm(fields), fields.size("hidden_size"), fields.size("num_attention_heads")
    block = bert_layer(fields, norm)
    assert isinstance(block.attention, GQA)
    found = [tensor("attention.self.q_bias", h), tensor("attention.self.v_bias", h)]
    if fields.flag("talking_head"):
        for name in ("head_logits_proj", "head_weights_proj"):
            found.append(tensor(f"attention.self.{name}.weight", H, H))
    if fields.flag("relative_attention"):
        kinds = _attended(fields)
        if "c2p" in kinds:
            found += _projection("pos_proj", h, bias=False)
        if "p2c" in kinds:
            found += _projection("pos_q_proj", h, bias=True)
    block = replace(
        block,
        attention=replace(block.attention, fused_qkv=True, qkv_bias=False, interleaved_qkv=True),
        extra_parameters=tuple(found),
    )
    return _encoder(fields, ending, block, norm, buckets=0)


def read_deberta_v2(fields: Fields) -> Model:
    """DeBERTa-v2 and v3: distances in buckets, and by flag a convolution beside the first block."""
    ending = named_class(fields, "DebertaV2", V2_ENDINGS)
    norm, h = layernorm(fields), fields.size("hidden_size")
    block, found = bert_layer(fields, norm), []
    width = h // fields.size("num_attention_heads")
    given = fields.config.get("attention_head_size", width)
    if given != width:
        raise ConfigError(f"attention_head_size={shown(given)} is not allowed: {width}")
    if fields.flag("relative_attention") and not fields.flag("share_att_key"):
        kinds = _attended(fields)
        if "c2p" in kinds:
            found += _projection("pos_key_proj", h, bias=True)
        if "p2c" in kinds:
            found += _projection("pos_query_proj", h, bias=True)
    fields.suppose(position_buckets=-1)
    block = replace(block, extra_parameters=tuple(found))
    return _encoder(
        fields,
        ending,
        block,
        norm,
        buckets=_whole(fields, "position_buckets"),
        beside=(*_distance_norm(fields, norm), *_convolution(fields, norm)),
    )


def _encoder(
    fields: Fields,
    ending: str,
    block: Layer,
    norm: Norm,
    *,
    buckets: int,
    beside: tuple[Parameter, ...] = (),
) -> Model:
    h, rows = fields.size("hidden_size"), fields.size("max_position_embeddings")
    given = fields.config.get("embedding_size", h)
    if given != h:
        raise ConfigError(f"embedding_size={shown(given)} is not read yet: hidden_size={h}")
    padding(fields, absent=0)
    head = _head(fields, ending, norm)
    types = fields.size("type_vocab_size", minimum=0)
    positions: Positions = NoPositions()
    outer = list(norm_parameters(norm, "embeddings.LayerNorm", h))
    if types:
        name = "embeddings.token_type_embeddings.weight"
        outer.append(tensor(name, types, h, group="embedding"))
    if fields.flag("relative_attention"):
        positions = RelativeBias()
        distances = _whole(fields, "max_relative_positions")
        reach = buckets if buckets > 0 else distances if distances > 0 else rows
        outer.append(tensor("encoder.rel_embeddings.weight", 2 * reach, h, group="embedding"))
    root = "" if ending == "Model" else "deberta."
    inner = [replace(p, name=f"{root}{p.name}") for p in (*outer, *beside)]
    legacy = fields.flag("legacy")
    return described(
        fields,
        layers=(block,) * layer_count(fields),
        positions=LearnedPositions() if fields.flag("position_biased_input") else positions,
        max_position_embeddings=rows,
        # the new head takes the embedding itself
        tie_word_embeddings=fields.flag("tie_word_embeddings") or not legacy,
        is_decoder=False,
        lm_head=head.lm_head,
        lm_head_bias=head.lm_head,
        extra_parameters=(*inner, *head.parameters),
        parameter_names=(
            *ATTENTION_NAMES,
            *bert_names(root),
            *head.names,
        ),
    )


def _head(fields: Fields, ending: str, norm: Norm) -> Head:
    h = fields.size("hidden_size")
    match ending:
        case "Model":
            return Head()
        case "ForMaskedLM" if fields.flag("legacy"):
            return cls_predictions(fields, norm)
        case "ForMaskedLM":
            module = "lm_predictions.lm_head"
            return Head(
                lm_head=True,
                parameters=(
                    *dense(f"{module}.dense", out=h, into=h),
                    *norm_parameters(norm, f"{module}.LayerNorm", h),
                ),
                names=(("lm_head.bias", f"{module}.bias"),),
            )
        case "ForSequenceClassification" | "ForMultipleChoice":
            given = fields.config.get("pooler_hidden_size", h)
            if given != h:
                raise ConfigError(
                    f"pooler_hidden_size={shown(given)} is not allowed: hidden_size={h}"
                )
            pooler = dense("pooler.dense", out=h, into=h)
            return Head(parameters=(*pooler, *labelled(fields, ending)))
    return Head(parameters=labelled(fields, ending))


def _attended(fields: Fields) -> list[str]:
    """`pos_att_type`: c2p content to position, p2c position to content; a list, or "p2c|c2p"."""
    kinds = fields.raw("pos_att_type")
    if isinstance(kinds, str):
        return [word.strip() for word in kinds.lower().split("|")]
    if kinds is None:
        return []
    if not isinstance(kinds, list) or not all(isinstance(word, str) for word in kinds):
        raise ConfigError(f"pos_att_type={shown(kinds)} is not allowed: c2p and p2c in a list")
    return kinds


def _projection(name: str, h: int, *, bias: bool) -> list[Parameter]:
    return list(linear(f"attention.self.{name}", "attention", out=h, into=h, bias=bias))


def _whole(fields: Fields, name: str) -> int:
    """A size that is off below 1."""
    return check_size(name, fields.raw(name), minimum=-1)


def _distance_norm(fields: Fields, norm: Norm) -> tuple[Parameter, ...]:
    """A norm of the table of distances."""
    fields.suppose(norm_rel_ebd="none")
    kinds = fields.raw("norm_rel_ebd")
    if not isinstance(kinds, str):
        raise ConfigError(f"norm_rel_ebd={shown(kinds)} is not allowed: none or layer_norm")
    if "layer_norm" not in (word.strip() for word in kinds.lower().split("|")):
        return ()
    return tuple(norm_parameters(norm, "encoder.LayerNorm", fields.size("hidden_size")))


def _convolution(fields: Fields, norm: Norm) -> tuple[Parameter, ...]:
    """Over the embeddings, added to what the first block gives."""
    fields.suppose(conv_kernel_size=0, conv_groups=1)
    K, h = fields.size("conv_kernel_size", minimum=0), fields.size("hidden_size")
    if not K:
        return ()
    groups = fields.size("conv_groups")
    if K % 2 == 0:
        raise ConfigError(f"conv_kernel_size={K} is not allowed: an odd number, or 0")
    if h % groups:
        raise ConfigError(f"hidden_size={h} is not a multiple of conv_groups={groups}")
    return (
        tensor("encoder.conv.conv.weight", h, h // groups, K, group="feed_forward"),
        tensor("encoder.conv.conv.bias", h, group="feed_forward"),
        *norm_parameters(norm, "encoder.conv.LayerNorm", h),
    )


READERS: dict[str, Callable[[Fields], Model]] = {
    "deberta": read_deberta,
    "deberta-v2": read_deberta_v2,
}
