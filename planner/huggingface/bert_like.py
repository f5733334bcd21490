"""Readers of bert, roberta, xlm-roberta and camembert: norms after each sum, heads by class.

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from planner.ends import Ends, Step
from planner.errors import ConfigError
from planner.huggingface.blocks import activation, layer_count, layernorm, plain
from planner.huggingface.fields import Fields
from planner.huggingface.gpt_like import head_width
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
from planner.layers import GQA, Activation, Dense, Layer, LearnedPositions, Norm
from planner.model import Model
from planner.parameters import norm_parameters
from planner.tensors import Parameter, tensor

BERT_ENDINGS = (
    "Model",
    "ForMaskedLM",
    "ForPreTraining",
    "ForNextSentencePrediction",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
ROBERTA_ENDINGS = tuple(e for e in BERT_ENDINGS if e not in BERT_ENDINGS[2:4])
BLOCK_NAMES: Names = (
    ("self_attn.q_proj", "attention.self.query"),
    ("self_attn.k_proj", "attention.self.key"),
    ("self_attn.v_proj", "attention.self.value"),
    ("self_attn.o_proj", "attention.output.dense"),
    ("post_attention_layernorm", "attention.output.LayerNorm"),
    ("mlp.up_proj", "intermediate.dense"),
    ("mlp.down_proj", "output.dense"),
    ("post_feedforward_layernorm", "output.LayerNorm"),
)


def read_bert(fields: Fields) -> Model:
    """BERT: two rows of token types, a pooler under the heads that classify sequences."""
    padding(fields, absent=0)
    ending = named_class(fields, "Bert", BERT_ENDINGS)
    root = "" if ending == "Model" else "bert."
    beside = (token_types(fields, root),)
    return encoder(fields, root=root, head=_bert(fields, ending), beside=beside)


def read_roberta(fields: Fields, *, stem: str, head_first: bool = False) -> Model:
    """RoBERTa: positions are counted from behind the padding token's number.

    `head_first`: its class makes the head before the model, and a tied weight has the first name.
    """
    ending = named_class(fields, stem, ROBERTA_ENDINGS)
    root, head = "" if ending == "Model" else "roberta.", roberta_head(fields, ending)
    if head_first and head.lm_head and fields.flag("tie_word_embeddings"):
        first = (f"{root}embeddings.word_embeddings", "lm_head.decoder")
        head = replace(head, names=(*head.names, first))
    return encoder(
        fields,
        root=root,
        head=head,
        offset=positions_offset(fields, padding(fields, absent=1)),
        beside=(token_types(fields, root),),
        pad=padding(fields, absent=1),
    )


def positions_offset(fields: Fields, pad: int | None) -> int:
    """Rows of the table of positions up to that of the padding token, which no position takes."""
    rows = fields.size("max_position_embeddings")
    if pad is None or not 0 <= pad < rows - 1:
        raise ConfigError(
            f"pad_token_id={pad} is not allowed: from 0, with positions behind it "
            f"below max_position_embeddings={rows}"
        )
    return pad + 1


def encoder(
    fields: Fields,
    *,
    root: str,
    head: Head,
    offset: int = 0,
    beside: tuple[Parameter, ...] = (),
    block_names: Names = BLOCK_NAMES,
    pad: int | None = None,
) -> Model:
    """The blocks, the embedding with its norm, and the head; `beside`: more parameters.

    `pad`: the token that takes no position, where there is one.
    """
    refuse(fields, is_decoder=False, add_cross_attention=False)
    h, norm = fields.size("hidden_size"), layernorm(fields)
    types = [p.name.removesuffix(".weight") for p in beside if "token_type" in p.name]
    return described(
        fields,
        layers=(bert_layer(fields, norm),) * layer_count(fields),
        positions=LearnedPositions(offset=offset),
        max_position_embeddings=fields.size("max_position_embeddings") - offset,
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        is_decoder=False,
        ends=Ends(
            token_types=types[0] if types else None,
            embedding_norm=(f"{root}embeddings.LayerNorm", norm),
            padding=pad,
            pooler=Step(name=f"{root}pooler.dense", activation="tanh") if head.pooler else None,
            reads=head.reads,
            steps=head.steps,
        ),
        lm_head=head.lm_head,
        lm_head_bias=head.lm_head,
        extra_parameters=(
            *beside,
            *norm_parameters(norm, f"{root}embeddings.LayerNorm", h),
            *(dense(f"{root}pooler.dense", out=h, into=h) if head.pooler else ()),
            *head.parameters,
        ),
        parameter_names=(*bert_names(root, block_names), *head.names),
    )


def token_types(fields: Fields, root: str) -> Parameter:
    """A row for each kind of segment."""
    rows, h = fields.size("type_vocab_size"), fields.size("hidden_size")
    return tensor(f"{root}embeddings.token_type_embeddings.weight", rows, h, group="embedding")


def bert_layer(fields: Fields, norm: Norm, feed_forward: Dense | None = None) -> Layer:
    """Attention and feed-forward with biases, a norm after each one's sum with the residual."""
    H, D = head_width(fields)
    return Layer(
        attention=GQA(
            num_attention_heads=H,
            num_key_value_heads=H,
            head_dim=D,
            scaling=D**-0.5,
            qkv_bias=True,
            o_bias=True,
        ),
        feed_forward=feed_forward or plain(fields),
        norm=norm,
        placement="post-sum",
    )


def bert_names(root: str, block_names: Names = BLOCK_NAMES) -> Names:
    """Checkpoint names of the bare model inside the module `root`."""
    return (
        ("embed_tokens", f"{root}embeddings.word_embeddings"),
        ("embed_positions", f"{root}embeddings.position_embeddings"),
        ("layers", f"{root}encoder.layer"),
        *block_names,
    )


def prediction_head(
    fields: Fields,
    norm: Norm,
    *,
    module: str,
    transform: str,
    norm_name: str,
    activation: Activation = "gelu",
) -> Head:
    """A linear layer and a norm before the logits, whose bias is tied as their weight is."""
    h, V = fields.size("hidden_size"), fields.size("vocab_size")
    turn, normed = f"{module}.{transform}dense", f"{module}.{transform}{norm_name}"
    untied: tuple[Parameter, ...] = ()
    if not fields.flag("tie_word_embeddings"):
        untied = (tensor(f"{module}.decoder.bias", V, group="head"),)
    return Head(
        lm_head=True,
        parameters=(
            *dense(turn, out=h, into=h),
            *norm_parameters(norm, normed, h),
            *untied,
        ),
        names=(("lm_head.bias", f"{module}.bias"), ("lm_head.weight", f"{module}.decoder.weight")),
        steps=(Step(name=turn, activation=activation, norm=norm, norm_name=normed),),
    )


def cls_predictions(fields: Fields, norm: Norm) -> Head:
    """BertLMPredictionHead."""
    return prediction_head(
        fields,
        norm,
        module="cls.predictions",
        transform="transform.",
        norm_name="LayerNorm",
        activation=activation(fields),
    )


def labelled(fields: Fields, ending: str) -> tuple[Parameter, ...]:
    """One linear layer: for sequences, tokens, choices or the two ends of an answer."""
    h = fields.size("hidden_size")
    match ending:
        case "ForMultipleChoice":
            return dense("classifier", out=1, into=h)
        case "ForQuestionAnswering":
            return dense("qa_outputs", out=label_count(fields), into=h)
    return dense("classifier", out=label_count(fields), into=h)


def label_steps(ending: str) -> tuple[Step, ...]:
    """How `labelled` is used; not described for choices, whose tokens have a dimension more."""
    if ending == "ForMultipleChoice":
        return ()
    return (Step(name="qa_outputs" if ending == "ForQuestionAnswering" else "classifier"),)


def _bert(fields: Fields, ending: str) -> Head:
    next_sentence = dense("cls.seq_relationship", out=2, into=fields.size("hidden_size"))
    match ending:
        case "Model":
            return Head(pooler=True)
        case "ForMaskedLM":
            return cls_predictions(fields, layernorm(fields))
        case "ForPreTraining":
            lm = cls_predictions(fields, layernorm(fields))
            return replace(lm, pooler=True, parameters=(*lm.parameters, *next_sentence))
        case "ForNextSentencePrediction":
            steps = (Step(name="cls.seq_relationship"),)
            return Head(pooler=True, parameters=next_sentence, reads="pooled", steps=steps)
    pooler = ending in ("ForSequenceClassification", "ForMultipleChoice")
    return Head(
        pooler=pooler,
        parameters=labelled(fields, ending),
        reads="pooled" if pooler else "all",
        steps=label_steps(ending),
    )


def roberta_head(fields: Fields, ending: str) -> Head:
    """RoBERTa's heads: sequences are classified without the pooler."""
    h = fields.size("hidden_size")
    match ending:
        case "Model":
            return Head(pooler=True)
        case "ForMaskedLM":
            return prediction_head(
                fields, layernorm(fields), module="lm_head", transform="", norm_name="layer_norm"
            )
        case "ForSequenceClassification":
            labels = dense("classifier.out_proj", out=label_count(fields), into=h)
            steps = (
                Step(name="classifier.dense", activation="tanh"),
                Step(name="classifier.out_proj"),
            )
            turned = dense("classifier.dense", out=h, into=h)
            return Head(parameters=(*turned, *labels), reads="first", steps=steps)
    pooler = ending == "ForMultipleChoice"
    return Head(pooler=pooler, parameters=labelled(fields, ending), steps=label_steps(ending))


READERS: dict[str, Callable[[Fields], Model]] = {
    "bert": read_bert,
    "camembert": partial(read_roberta, stem="Camembert", head_first=True),
    "roberta": partial(read_roberta, stem="Roberta"),
    "xlm-roberta": partial(read_roberta, stem="XLMRoberta", head_first=True),
}
