"""Readers of bart, mbart and pegasus: two stacks of d_model, one embedding for both and the head.

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from planner.errors import MAX_LAYERS, ConfigError
from planner.huggingface.blocks import activation
from planner.huggingface.fields import Fields
from planner.huggingface.heads import (
    Head,
    Names,
    dense,
    described,
    label_count,
    named_class,
    padding,
    refuse,
)
from planner.layers import GQA, Dense, Layer, LearnedPositions, Norm
from planner.model import Model, Tower
from planner.parameters import norm_parameters
from planner.tensors import Parameter, tensor

NORM = Norm(kind="layernorm", eps=1e-5, bias=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What differs between the classes that were copied from Bart's.

    `before`: norms stand before attention and feed-forward, and a last one closes each stack.
    `embedding_norm`: one follows the embedding. `offset`: rows more in the tables of positions.
    """

    stem: str
    before: bool
    embedding_norm: bool
    offset: int
    pad_token_id: int
    num_labels: int = 2
    endings: tuple[str, ...] = (
        "ForConditionalGeneration",
        "Model",
        "ForSequenceClassification",
        "ForQuestionAnswering",
    )


def read_bart(fields: Fields, *, family: Family) -> Model:
    """Bart and its copies: without ties, three embeddings of which the first is never used."""
    ending = named_class(fields, family.stem, family.endings)
    padding(fields, absent=family.pad_token_id)
    root = "" if ending == "Model" else "model."
    head = _head(fields, ending, family)
    h, rows = fields.size("hidden_size"), fields.size("max_position_embeddings")
    tied = fields.flag("tie_word_embeddings")
    positions = LearnedPositions(offset=family.offset)
    embeddings = [
        tensor(f"{stack}_embedding.weight", fields.size("vocab_size"), h, group="embedding")
        for stack in ("encoder", "decoder")
    ]
    embedding_norm = NORM if family.embedding_norm else None
    outer = [tensor("embed_positions.weight", rows + family.offset, h)]
    if family.before:
        outer += norm_parameters(NORM, "norm", h)
    if family.embedding_norm:
        outer += norm_parameters(NORM, "embed_norm", h)
    tower = encoder_tower(fields, root, outer, before=family.before)
    return described(
        fields,
        layers=stack_of(fields, "decoder", before=family.before),
        final_norm=NORM if family.before else None,
        positions=positions,
        max_position_embeddings=rows,
        tie_word_embeddings=tied,
        lm_head=head.lm_head,
        embedding_norm=embedding_norm,
        embedding_norm_last=family.embedding_norm,
        embedding_scale=h**0.5 if fields.flag("scale_embedding") else None,
        final_logits_bias=head.lm_head,
        extra_parameters=(*(() if tied else embeddings), *head.parameters),
        parameter_names=(
            ("embed_tokens", f"{root}shared"),
            ("encoder_embedding", f"{root}encoder.embed_tokens"),
            ("decoder_embedding", f"{root}decoder.embed_tokens"),
            *names(root, "decoder", before=family.before),
        ),
        towers=(replace(tower, positions=positions, embedding_norm=embedding_norm),),
    )


def encoder_tower(
    fields: Fields, root: str, outer: list[Parameter], *, before: bool, unbiased: str = ""
) -> Tower:
    """The encoder, with what stands outside its blocks."""
    return Tower(
        part="encoder",
        hidden_size=fields.size("hidden_size"),
        layers=stack_of(fields, "encoder", before=before, unbiased=unbiased),
        outer=tuple(outer),
        parameter_names=names(root, "encoder", before=before),
        final_norm=NORM if before else None,
    )


def stack_of(fields: Fields, stack: str, *, before: bool, unbiased: str = "") -> tuple[Layer, ...]:
    """The blocks of the encoder or the decoder, whose sizes have fields of their own.

    An alias, `num_hidden_layers` say, overwrites the encoder's: the config classes set it last.
    """
    refuse(fields, is_encoder_decoder=True, sliding_window=None, layer_types=None)
    own = {"encoder": ("num_attention_heads", "num_hidden_layers")}
    heads, count = own.get(stack, ("decoder_attention_heads", "decoder_layers"))
    h, H = fields.size("hidden_size"), fields.size(heads)
    if h % H:
        raise ConfigError(f"d_model={h} is not a multiple of {stack}_attention_heads={H}")
    attention = GQA(
        num_attention_heads=H,
        num_key_value_heads=H,
        head_dim=h // H,
        scaling=(h // H) ** -0.5,
        qkv_bias=True,
        o_bias=True,
        unbiased=unbiased,
    )
    layer = Layer(
        attention=attention,
        cross_attention=attention if stack == "decoder" else None,
        feed_forward=Dense(
            intermediate_size=fields.size(f"{stack}_ffn_dim"),
            activation=activation(fields, "activation_function"),
            gated=False,
            bias=True,
        ),
        norm=NORM,
        placement="pre" if before else "post-sum",
    )
    return (layer,) * fields.size(count, maximum=MAX_LAYERS)


def names(root: str, stack: str, *, before: bool) -> Names:
    """Checkpoint names of one stack."""
    first, second = (
        ("input", "post_attention") if before else ("post_attention", "post_feedforward")
    )
    return (
        ("embed_positions", f"{root}{stack}.embed_positions"),
        ("embed_norm", f"{root}{stack}.layernorm_embedding"),
        ("norm", f"{root}{stack}.layer_norm"),
        ("layers", f"{root}{stack}.layers"),
        (f"{first}_layernorm", "self_attn_layer_norm"),
        (f"{second}_layernorm", "final_layer_norm"),
        ("cross_attn", "encoder_attn"),
        ("cross_attention_layernorm", "encoder_attn_layer_norm"),
        ("o_proj", "out_proj"),
        ("mlp.up_proj", "fc1"),
        ("mlp.down_proj", "fc2"),
    )


def _head(fields: Fields, ending: str, family: Family) -> Head:
    h = fields.size("hidden_size")
    match ending:
        case "ForConditionalGeneration":
            return Head(lm_head=True)
        case "ForSequenceClassification":
            name, labels = "classification_head", label_count(fields, absent=family.num_labels)
            out = dense(f"{name}.out_proj", out=labels, into=h)
            return Head(parameters=(*dense(f"{name}.dense", out=h, into=h), *out))
        case "ForQuestionAnswering":
            return Head(parameters=dense("qa_outputs", out=2, into=h))
    return Head()


BART = Family(
    stem="Bart", before=False, embedding_norm=True, offset=2, pad_token_id=1, num_labels=3
)
MBART = Family(stem="MBart", before=True, embedding_norm=True, offset=2, pad_token_id=1)
PEGASUS = Family(
    stem="Pegasus",
    before=True,
    embedding_norm=False,
    offset=0,
    pad_token_id=0,
    endings=("ForConditionalGeneration", "Model"),
)

READERS: dict[str, Callable[[Fields], Model]] = {
    "bart": partial(read_bart, family=BART),
    "mbart": partial(read_bart, family=MBART),
    "pegasus": partial(read_bart, family=PEGASUS),
}
