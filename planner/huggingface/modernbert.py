"""Reader of modernbert: rotary positions, local and global layers, one matrix for q, k and v.

It follows models/modernbert/ of transformers 5.23.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ends import Ends, Reads, Step
from planner.errors import check_choice
from planner.huggingface.bert_like import labelled
from planner.huggingface.blocks import activation, layer_count, layer_windows, layernorm
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
from planner.huggingface.mixed import rope_by_kind
from planner.layers import GQA, Dense, Layer, Norm
from planner.model import Model
from planner.parameters import norm_parameters
from planner.tensors import Parameter

ENDINGS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
PAD_TOKEN = 50283
THETAS: dict[str, tuple[str | None, float]] = {
    "full_attention": ("global_rope_theta", 160_000.0),
    "sliding_attention": ("local_rope_theta", 10_000.0),
}
POOLING: dict[str, Reads] = {"cls": "first", "mean": "mean"}
BLOCK_NAMES: Names = (
    ("self_attn.qkv_proj", "attn.Wqkv"),
    ("self_attn.o_proj", "attn.Wo"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "mlp_norm"),
    ("mlp.gate_up_proj", "mlp.Wi"),
    ("mlp.down_proj", "mlp.Wo"),
)


def read_modernbert(fields: Fields) -> Model:
    """ModernBERT: every third layer global; the first block has no norm before its attention."""
    refuse(fields, rope_scaling=None)
    padding(fields, absent=PAD_TOKEN)
    ending = named_class(fields, "ModernBert", ENDINGS)
    h, norm = (
        fields.size("hidden_size"),
        layernorm(fields, "norm_eps", bias=fields.flag("norm_bias")),
    )
    H, D = head_width(fields)
    bias = fields.flag("attention_bias")
    attention = GQA(
        num_attention_heads=H,
        num_key_value_heads=H,
        head_dim=D,
        scaling=D**-0.5,
        qkv_bias=bias,
        o_bias=bias,
        fused_qkv=True,
    )
    block = Layer(
        attention=attention,
        feed_forward=Dense(
            intermediate_size=fields.size("intermediate_size"),
            activation=activation(fields, "hidden_activation"),
            gated=True,
            bias=fields.flag("mlp_bias"),
            fused_gate_up=True,
        ),
        norm=norm,
    )
    windows = _windows(fields)
    made = {w: replace(block, attention=replace(attention, sliding_window=w)) for w in windows}
    layers = [made[window] for window in windows]
    layers[0] = replace(layers[0], norms=("post_attention_layernorm",))
    positions, local = rope_by_kind(fields, head_dim=D, thetas=THETAS)
    head, root = _head(fields, ending, norm), "" if ending == "Model" else "model."
    return described(
        fields,
        layers=tuple(layers),
        final_norm=norm,
        positions=positions,
        local_positions=local,
        max_position_embeddings=fields.size("max_position_embeddings"),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        is_decoder=False,
        ends=Ends(embedding_norm=("embedding_norm", norm), reads=head.reads, steps=head.steps),
        lm_head=head.lm_head,
        lm_head_bias=head.lm_head and fields.flag("decoder_bias"),
        extra_parameters=(*norm_parameters(norm, "embedding_norm", h), *head.parameters),
        parameter_names=(
            ("embed_tokens", f"{root}embeddings.tok_embeddings"),
            ("layers", f"{root}layers"),
            ("norm", f"{root}final_norm"),
            ("embedding_norm", f"{root}embeddings.norm"),
            ("head_norm", "head.norm"),
            ("lm_head", "decoder"),
            *BLOCK_NAMES,
        ),
    )


def _windows(fields: Fields) -> list[int | None]:
    """The window of every layer: `local_attention` positions around the query's own.

    A `sliding_window` is half of one, and overwrites it.
    """
    window = fields.size("local_attention")
    if fields.has("sliding_window"):
        window = 2 * fields.size("sliding_window")
    if fields.raw("layer_types") is not None:
        return layer_windows(fields, window=window)
    fields.suppose(global_attn_every_n_layers=3)
    every = fields.size("global_attn_every_n_layers")
    return [window if index % every else None for index in range(layer_count(fields))]


def _head(fields: Fields, ending: str, norm: Norm) -> Head:
    if ending == "Model":
        return Head()
    h = fields.size("hidden_size")
    pooling = check_choice("classifier_pooling", fields.raw("classifier_pooling"), tuple(POOLING))
    act = activation(fields, "classifier_activation")
    transform: tuple[Parameter, ...] = (
        *dense("head.dense", out=h, into=h, bias=fields.flag("classifier_bias")),
        *norm_parameters(norm, "head_norm", h),
    )
    turn = Step(name="head.dense", activation=act, norm=norm, norm_name="head_norm")
    steps = (turn, Step(name="classifier"))
    match ending:
        case "ForMaskedLM":
            return Head(lm_head=True, parameters=transform, steps=(turn,))
        case "ForQuestionAnswering":
            labels = dense("classifier", out=label_count(fields), into=h)
            return Head(parameters=(*transform, *labels), steps=steps)
    labels = labelled(fields, ending)
    if ending == "ForMultipleChoice":  # its tokens have a dimension more
        return Head(parameters=(*transform, *labels))
    reads = POOLING[pooling] if ending == "ForSequenceClassification" else "all"
    return Head(parameters=(*transform, *labels), reads=reads, steps=steps)


READERS = {"modernbert": read_modernbert}
