"""Readers of t5, mt5 and umt5: biases by relative distance, scores without a scale.

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from planner.errors import MAX_LAYERS, ConfigError, check_choice, shown
from planner.huggingface.blocks import layer_count
from planner.huggingface.fields import Fields
from planner.huggingface.heads import (
    Head,
    Names,
    dense,
    described,
    label_count,
    named_class,
    refuse,
)
from planner.layers import ACTIVATIONS, GQA, Dense, Layer, Norm, RelativeBias
from planner.model import Model, Tower
from planner.tensors import Parameter, tensor

ENDINGS = (
    "ForConditionalGeneration",
    "Model",
    "EncoderModel",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
ENCODERS = ("EncoderModel", "ForTokenClassification")
"""Classes without a decoder."""

BLOCK_NAMES: Names = (
    ("self_attn", "layer.0.SelfAttention"),
    ("cross_attn", "layer.1.EncDecAttention"),
    ("q_proj", "q"),
    ("k_proj", "k"),
    ("v_proj", "v"),
    ("o_proj", "o"),
    ("input_layernorm", "layer.0.layer_norm"),
    ("cross_attention_layernorm", "layer.1.layer_norm"),
)


def read_t5(fields: Fields, *, stem: str, every_layer: bool = False) -> Model:
    """T5: tied whatever its config says; `every_layer` has a table of biases (umt5), or the first.

    `tie_word_embeddings` false means T5 v1.1: the decoder's output is not scaled before the head.
    """
    refuse(fields, is_encoder_decoder=True, sliding_window=None, layer_types=None)
    ending = named_class(fields, stem, ENDINGS)
    positions = RelativeBias(max_distance=fields.size("relative_attention_max_distance"))
    alone = ending in ENCODERS
    if alone:
        refuse(fields, is_decoder=False)
    h, H = fields.size("hidden_size"), fields.size("num_attention_heads")
    norm = Norm(kind="rmsnorm", eps=fields.number("layer_norm_epsilon"))
    attention = GQA(
        num_attention_heads=H,
        num_key_value_heads=H,
        head_dim=fields.size("head_dim"),
        scaling=1.0,
    )
    feed_forward = _feed_forward(fields)
    block = Layer(attention=attention, feed_forward=feed_forward, norm=norm)
    biased = replace(block, extra_parameters=_bias_table(fields, H))
    rest = biased if every_layer else block
    encoder = (biased, *[rest] * (layer_count(fields) - 1))
    head = _head(fields, ending, h)
    root = "transformer." if ending in ("ForSequenceClassification", ENCODERS[1]) else ""
    common = {
        "positions": positions,
        "max_position_embeddings": None,
        "tie_word_embeddings": True,
        "final_norm": norm,
        "lm_head": head.lm_head,
        "extra_parameters": head.parameters,
    }
    if alone:
        return described(
            fields,
            layers=encoder,
            is_decoder=False,
            parameter_names=_names(root, "encoder", feed_forward),
            **common,  # type: ignore[arg-type]
        )
    crossed = [replace(layer, cross_attention=attention) for layer in (biased, rest)]
    return described(
        fields,
        layers=(crossed[0], *[crossed[1]] * (_decoder_layers(fields) - 1)),
        parameter_names=_names(root, "decoder", feed_forward),
        logit_scale=h**-0.5 if head.lm_head and _scaled(fields, stem) else None,
        towers=(
            Tower(
                part="encoder",
                hidden_size=h,
                layers=encoder,
                outer=(tensor("norm.weight", h),),
                parameter_names=_names(root, "encoder", feed_forward),
                positions=positions,
                final_norm=norm,
            ),
        ),
        **common,  # type: ignore[arg-type]
    )


def _head(fields: Fields, ending: str, h: int) -> Head:
    match ending:
        case "ForConditionalGeneration":
            return Head(lm_head=True)
        case "ForSequenceClassification":
            name = "classification_head"
            labels = dense(f"{name}.out_proj", out=label_count(fields), into=h)
            return Head(parameters=(*dense(f"{name}.dense", out=h, into=h), *labels))
        case "ForTokenClassification":
            return Head(parameters=dense("classifier", out=label_count(fields), into=h))
        case "ForQuestionAnswering":
            return Head(parameters=dense("qa_outputs", out=label_count(fields), into=h))
    return Head()


def _feed_forward(fields: Fields) -> Dense:
    """`feed_forward_proj`: an activation, or gated-… before one; gated-gelu means gelu_new.

    `dense_act_fn` and `is_gated_act`, which saved configs carry, have the last word.
    """
    words = fields.raw("feed_forward_proj")
    parts = words.split("-") if isinstance(words, str) else []
    if len(parts) not in (1, 2) or (len(parts) == 2 and parts[0] != "gated"):
        raise ConfigError(
            f"feed_forward_proj={shown(words)} is not allowed: an activation, or gated- and one"
        )
    activation = "gelu_new" if words == "gated-gelu" else parts[-1]
    gated = parts[0] == "gated"
    if fields.has("dense_act_fn"):
        activation = fields.raw("dense_act_fn")
    if fields.has("is_gated_act"):
        gated = fields.flag("is_gated_act")
    return Dense(
        intermediate_size=fields.size("d_ff"),
        activation=check_choice("feed_forward_proj", activation, ACTIVATIONS),  # type: ignore[arg-type]
        gated=gated,
    )


def _bias_table(fields: Fields, H: int) -> tuple[Parameter, ...]:
    """A bias for each bucket of distances and each head; half the buckets are logarithmic."""
    buckets = fields.size("relative_attention_num_buckets", minimum=4)
    distance = fields.size("relative_attention_max_distance")
    if distance <= buckets // 2:
        raise ConfigError(
            f"relative_attention_max_distance={distance} is not allowed: more than half of "
            f"relative_attention_num_buckets={buckets}"
        )
    return (tensor("self_attn.relative_attention_bias.weight", buckets, H),)


def _decoder_layers(fields: Fields) -> int:
    """`num_decoder_layers`; null: as many as the field `num_layers`, not its alias, says."""
    if fields.raw("num_decoder_layers") is None:
        fields.spell(num_decoder_layers=("num_layers",))
    return fields.size("num_decoder_layers", maximum=MAX_LAYERS)


def _scaled(fields: Fields, stem: str) -> bool:
    """Whether the decoder's output is multiplied by 1/√d before the head."""
    if stem == "T5" and fields.has("scale_decoder_outputs"):
        return fields.flag("scale_decoder_outputs")
    if stem == "T5":
        return fields.config.get("tie_word_embeddings") is not False
    return stem == "UMT5"


def _names(root: str, stack: str, feed_forward: Dense) -> Names:
    second = "layer.2" if stack == "decoder" else "layer.1"
    up = "wi_1" if feed_forward.gated else "wi"
    return (
        ("embed_tokens", f"{root}shared"),
        ("norm", f"{root}{stack}.final_layer_norm"),
        ("layers", f"{root}{stack}.block"),
        *BLOCK_NAMES,
        ("post_attention_layernorm", f"{second}.layer_norm"),
        ("mlp.gate_proj", f"{second}.DenseReluDense.wi_0"),
        ("mlp.up_proj", f"{second}.DenseReluDense.{up}"),
        ("mlp.down_proj", f"{second}.DenseReluDense.wo"),
    )


READERS = {
    "mt5": partial(read_t5, stem="MT5"),
    "t5": partial(read_t5, stem="T5"),
    "umt5": partial(read_t5, stem="UMT5", every_layer=True),
}
