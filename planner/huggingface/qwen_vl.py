"""Readers of qwen2_vl, qwen2_5_vl, qwen3_vl and qwen3_vl_moe (transformers 5.23).

Text is a Qwen whose positions have three parts, time, height and width, on plain rotary ones.
"""

from __future__ import annotations

from dataclasses import replace

from planner.errors import ConfigError, shown
from planner.huggingface.blocks import (
    chosen_head,
    gated,
    gqa,
    gqa_decoder,
    heads,
    rmsnorm,
    rope,
    stray_windows,
)
from planner.huggingface.fields import Fields, class_defaults
from planner.huggingface.llama_like import read_qwen2
from planner.huggingface.mixed import decoder, required_kv_heads, sparse_layers, windowed
from planner.huggingface.qwen_gemma import qwen_mixture
from planner.huggingface.qwen_vision import qwen2_5_vision, qwen2_vision, qwen3_vision
from planner.huggingface.towers import inside
from planner.huggingface.wrapper import Reader, TowerReader, part, text_by, tower_of, wrapped
from planner.layers import GQA, QKNorm, RoPE
from planner.model import Model

ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta")


def _qwen2_text(fields: Fields) -> Model:
    """Qwen2's, whose heads have no width of their own; "mrope" is the plain kind's old name."""
    config = {name: value for name, value in fields.config.items() if name != "head_dim"}
    for name in ("rope_scaling", "rope_parameters"):
        rotary = config.get(name)
        if isinstance(rotary, dict) and rotary.get("rope_type", rotary.get("type")) == "mrope":
            config[name] = {**rotary, "rope_type": "default"}
    fields.config = config
    model = read_qwen2(fields)
    H, h = fields.size("num_attention_heads"), fields.size("hidden_size")
    sections = _sections(model, absent=(16, 24, 24))
    if 2 * sum(sections) != h // H:
        raise ConfigError(
            f"mrope_section={list(sections)} is not allowed: adding up to half of head_dim={h // H}"
        )
    return model


def _sections(model: Model, *, absent: tuple[int, ...]) -> tuple[int, ...]:
    """How many frequencies turn with time, height and width."""
    scaling = model.positions.scaling if isinstance(model.positions, RoPE) else ()
    sections = dict(scaling).get("mrope_section", absent)
    counts = sections if isinstance(sections, tuple) else ()
    if len(counts) < 3 or any(type(n) is not int or n < 0 for n in counts):
        raise ConfigError(f"mrope_section={shown(sections)} is not allowed: three whole numbers")
    return tuple(int(n) for n in counts)


def _qwen3_attention(fields: Fields) -> GQA:
    bias, norm = fields.flag("attention_bias"), rmsnorm(fields)
    return gqa(heads(fields), qkv_bias=bias, o_bias=bias, qk_norm=QKNorm(norm=norm, width="head"))


def _qwen3_text(fields: Fields) -> Model:
    """Qwen3's, without windows of its own."""
    fields.size("head_dim")
    model = gqa_decoder(
        fields,
        stem="Qwen3VLText",
        attention=_qwen3_attention(fields),
        windows=stray_windows(fields),
        feed_forward=gated(fields),
    )
    _sections(model, absent=(24, 20, 20))
    return model


def _qwen3_moe_text(fields: Fields) -> Model:
    """Qwen3-MoE's, its top-k weights always made to sum to one."""
    required_kv_heads(fields)
    attention, mixture = _qwen3_attention(fields), qwen_mixture(fields)
    if mixture is not None:
        mixture = replace(mixture, norm_topk_prob=True)
    model = decoder(
        fields,
        stem="Qwen3VLMoeText",
        attentions=windowed(attention, stray_windows(fields)),
        feed_forwards=sparse_layers(fields, dense=gated(fields), mixture=mixture),
        norm=rmsnorm(fields),
        positions=rope(fields, head_dim=attention.head_dim),
    )
    _sections(model, absent=(24, 20, 20))
    return model


TEXT: dict[str, Reader] = {
    "qwen2_5_vl_text": _qwen2_text,
    "qwen2_vl_text": _qwen2_text,
    "qwen3_vl_moe_text": _qwen3_moe_text,
    "qwen3_vl_text": _qwen3_text,
}


def _read(fields: Fields, stem: str, tower: TowerReader, text: Fields, *, own_tie: bool) -> Model:
    """`own_tie`: the text's own flag ties too."""
    head = chosen_head(fields, f"{stem}ForConditionalGeneration", f"{stem}Model")
    base = "" if head == f"{stem}Model" else "model."
    model, inner = text_by(TEXT, text, fields)
    kind = f"{fields.model_type}_vision"
    vision, _ = tower_of(fields, {kind: tower}, kind, only=True)
    tie = fields.flag("tie_word_embeddings")
    return wrapped(
        fields,
        model,
        inside(vision, f"{base}visual"),
        base=f"{base}language_model",
        tie=tie or (own_tie and bool(inner.config.get("tie_word_embeddings"))),
        head=bool(base),
    )


def _flat_text(fields: Fields, model_type: str) -> Fields:
    """`text_config`, or the fields of that class which stand at the top where there is none."""
    if fields.config.get("text_config") is not None:
        return part(fields, "text_config", model_type, only=True)
    names = (*class_defaults()["model_types"][model_type]["fields"], *ROPE_FIELDS)
    flat = {name: fields.config[name] for name in names if name in fields.config}
    return fields.part("text_config", model_type, flat)


def read_qwen2_vl(fields: Fields) -> Model:
    """Qwen2-VL: published configs hold the text's fields at the top."""
    text = _flat_text(fields, "qwen2_vl_text")
    return _read(fields, "Qwen2VL", qwen2_vision, text, own_tie=True)


def read_qwen2_5_vl(fields: Fields) -> Model:
    """Qwen2.5-VL: published configs hold the text's fields at the top."""
    text = _flat_text(fields, "qwen2_5_vl_text")
    return _read(fields, "Qwen2_5_VL", qwen2_5_vision, text, own_tie=True)


def read_qwen3_vl(fields: Fields) -> Model:
    """Qwen3-VL: the text's own `tie_word_embeddings` says nothing."""
    text = part(fields, "text_config", "qwen3_vl_text", only=True)
    return _read(fields, "Qwen3VL", qwen3_vision, text, own_tie=False)


def read_qwen3_vl_moe(fields: Fields) -> Model:
    """Qwen3-VL with a mixture for its text."""
    text = part(fields, "text_config", "qwen3_vl_moe_text", only=True)
    return _read(fields, "Qwen3VLMoe", qwen3_vision, text, own_tie=False)


READERS = {
    "qwen2_5_vl": read_qwen2_5_vl,
    "qwen2_vl": read_qwen2_vl,
    "qwen3_vl": read_qwen3_vl,
    "qwen3_vl_moe": read_qwen3_vl_moe,
}
