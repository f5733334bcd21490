"""Reader of gpt2 (transformers 5.23, models/gpt2/)."""

from __future__ import annotations

from planner.errors import ConfigError
from planner.huggingface.blocks import activation, causal_lm, layer_count
from planner.huggingface.fields import Fields
from planner.layers import GQA, Dense, Layer, LearnedPositions, Norm
from planner.model import Model

GPT2_NAMES = (
    ("embed_tokens", "transformer.wte"),
    ("embed_positions", "transformer.wpe"),
    ("norm", "transformer.ln_f"),
    ("layers", "transformer.h"),
    ("input_layernorm", "ln_1"),
    ("post_attention_layernorm", "ln_2"),
    ("self_attn.qkv_proj", "attn.c_attn"),
    ("self_attn.o_proj", "attn.c_proj"),
    ("mlp.up_proj", "mlp.c_fc"),
    ("mlp.down_proj", "mlp.c_proj"),
)


def read_gpt2(fields: Fields) -> Model:
    """GPT-2: MHA with biases, learned positions, weights stored [in, out] (Conv1D)."""
    h, H = fields.size("hidden_size"), fields.size("num_attention_heads")
    if h % H:
        raise ConfigError(f"hidden_size={h} is not a multiple of num_attention_heads={H}")
    for name in ("add_cross_attention", "scale_attn_by_inverse_layer_idx"):
        if fields.flag(name):
            raise ConfigError(f"{name}=True is not read yet: false")
    D = h // H
    attention = GQA(
        num_attention_heads=H,
        num_key_value_heads=H,
        head_dim=D,
        scaling=D**-0.5 if fields.flag("scale_attn_weights") else 1.0,
        qkv_bias=True,
        o_bias=True,
        fused_qkv=True,
    )
    feed_forward = Dense(
        intermediate_size=fields.optional_size("n_inner") or 4 * h,
        activation=activation(fields, "activation_function"),
        gated=False,
        bias=True,
    )
    norm = Norm(kind="layernorm", eps=fields.number("layer_norm_epsilon"), bias=True)
    layer = Layer(attention=attention, feed_forward=feed_forward, norm=norm)
    return causal_lm(
        fields,
        layers=(layer,) * layer_count(fields),
        final_norm=norm,
        positions=LearnedPositions(),
        names=GPT2_NAMES,
        base_class="GPT2Model",
        head_class="GPT2LMHeadModel",
        transposed_linears=True,
    )


READERS = {
    "gpt2": read_gpt2,
}
