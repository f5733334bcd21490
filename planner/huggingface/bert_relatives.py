"""Readers of distilbert and mpnet: BERT without token types, under other names.

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`).
"""

from __future__ import annotations

from collections.abc import Callable

from planner.ends import Ends, Step
from planner.errors import ConfigError
from planner.huggingface.bert_like import (
    BLOCK_NAMES,
    ROBERTA_ENDINGS,
    bert_layer,
    encoder,
    label_steps,
    labelled,
    positions_offset,
    roberta_head,
)
from planner.huggingface.blocks import layer_count, plain
from planner.huggingface.fields import Fields
from planner.huggingface.heads import (
    Head,
    Names,
    dense,
    described,
    label_count,
    named_class,
    padding,
)
from planner.layers import Activation, LearnedPositions, Norm
from planner.model import Model
from planner.parameters import norm_parameters
from planner.tensors import tensor

DISTILBERT_NORM = Norm(kind="layernorm", eps=1e-12, bias=True)
DISTILBERT_ENDINGS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
DISTILBERT_NAMES: Names = (
    ("self_attn.q_proj", "attention.q_lin"),
    ("self_attn.k_proj", "attention.k_lin"),
    ("self_attn.v_proj", "attention.v_lin"),
    ("self_attn.o_proj", "attention.out_lin"),
    ("post_attention_layernorm", "sa_layer_norm"),
    ("mlp.up_proj", "ffn.lin1"),
    ("mlp.down_proj", "ffn.lin2"),
    ("post_feedforward_layernorm", "output_layer_norm"),
    ("lm_head", "vocab_projector"),
)
MPNET_NAMES: Names = (
    ("self_attn.q_proj", "attention.attn.q"),
    ("self_attn.k_proj", "attention.attn.k"),
    ("self_attn.v_proj", "attention.attn.v"),
    ("self_attn.o_proj", "attention.attn.o"),
    ("post_attention_layernorm", "attention.LayerNorm"),
    *BLOCK_NAMES[-3:],
)


def read_distilbert(fields: Fields) -> Model:
    """DistilBERT: sizes have names of their own; sinusoidal positions are a parameter all the same.

    Of the head's weight and bias only the weight is tied.
    """
    padding(fields, absent=0)
    ending = named_class(fields, "DistilBert", DISTILBERT_ENDINGS)
    root = "" if ending == "Model" else "distilbert."
    feed_forward = plain(
        fields, activation_field="activation", intermediate_size=fields.size("hidden_dim")
    )
    head = _distilbert_head(fields, ending, feed_forward.activation)
    norm = DISTILBERT_NORM
    return described(
        fields,
        layers=(bert_layer(fields, norm, feed_forward),) * layer_count(fields),
        positions=LearnedPositions(),
        max_position_embeddings=fields.size("max_position_embeddings"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        is_decoder=False,
        ends=Ends(
            embedding_norm=(f"{root}embeddings.LayerNorm", norm),
            reads=head.reads,
            steps=head.steps,
        ),
        lm_head=head.lm_head,
        lm_head_bias=head.lm_head,
        extra_parameters=(
            *norm_parameters(norm, f"{root}embeddings.LayerNorm", fields.size("hidden_size")),
            *head.parameters,
        ),
        parameter_names=(
            ("embed_tokens", f"{root}embeddings.word_embeddings"),
            ("embed_positions", f"{root}embeddings.position_embeddings"),
            ("layers", f"{root}transformer.layer"),
            *DISTILBERT_NAMES,
        ),
    )


def _distilbert_head(fields: Fields, ending: str, activation: Activation) -> Head:
    h = fields.size("hidden_size")
    match ending:
        case "Model":
            return Head()
        case "ForMaskedLM":
            name, norm = "vocab_layer_norm", DISTILBERT_NORM
            made = (*dense("vocab_transform", out=h, into=h), *norm_parameters(norm, name, h))
            step = Step(name="vocab_transform", activation=activation, norm=norm, norm_name=name)
            return Head(lm_head=True, parameters=made, steps=(step,))
        case "ForSequenceClassification" | "ForMultipleChoice":
            before = dense("pre_classifier", out=h, into=h)
            first = Step(name="pre_classifier", activation="relu")
            return Head(
                parameters=(*before, *labelled(fields, ending)),
                reads="first",
                steps=(first, *label_steps(ending)),
            )
        case "ForQuestionAnswering" if label_count(fields) != 2:
            raise ConfigError(f"num_labels={label_count(fields)} is not allowed: 2, start and end")
    return Head(parameters=labelled(fields, ending), steps=label_steps(ending))


def read_mpnet(fields: Fields) -> Model:
    """MPNet: RoBERTa with a table of relative distances beside the blocks; padding is token 1."""
    padding(Fields({**fields.config, "pad_token_id": 1}, fields.model_type), absent=1)
    ending = named_class(fields, "MPNet", ROBERTA_ENDINGS)
    root = "" if ending == "Model" else "mpnet."
    heads = fields.size("num_attention_heads")
    # its forward sorts into 32 buckets whatever the config says
    buckets = fields.size("relative_attention_num_buckets", minimum=32)
    table = f"{root}encoder.relative_attention_bias.weight"
    return encoder(
        fields,
        root=root,
        head=roberta_head(fields, ending),
        offset=positions_offset(fields, 1),
        beside=(tensor(table, buckets, heads),),
        pad=1,
        block_names=MPNET_NAMES,
    )


READERS: dict[str, Callable[[Fields], Model]] = {
    "distilbert": read_distilbert,
    "mpnet": read_mpnet,
}
