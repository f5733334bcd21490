"""Readers of llava, mistral3, gemma3 and llama4: a tower, a projector, a language model.

Each follows its configuration and modelling file in transformers 5.23 (`models/<type>/`).
"""

from __future__ import annotations

from planner.errors import ConfigError, check_choice, shown
from planner.huggingface.blocks import activation, chosen_head
from planner.huggingface.contrastive import clip_vision, siglip_vision
from planner.huggingface.fields import Fields
from planner.huggingface.rotary_vision import llama4_vision, pixtral
from planner.huggingface.towers import head_linear, inside
from planner.huggingface.wrapper import named, text_of, tower_of, wrapped
from planner.model import Model, Tower
from planner.tensors import Parameter, tensor

TOWERS = {
    "clip_vision_model": clip_vision,
    "pixtral": pixtral,
    "siglip_vision_model": siglip_vision,
}
LLAVA_VISION = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
}
MISTRAL3_VISION = {
    "hidden_size": 1024,
    "image_size": 1540,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
}
MISTRAL3_TEXT = {
    "head_dim": 128,
    "hidden_size": 5120,
    "intermediate_size": 32768,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e9,
    "sliding_window": None,
    "vocab_size": 131072,
}


def _beside(base: str, tower: Tower, *projector: Parameter) -> tuple[Tower, Tower]:
    """The tower and the projector under the names that most wrappers give them."""
    made = Tower(part="projector", outer=projector)
    return inside(tower, f"{base}vision_tower"), inside(made, f"{base}multi_modal_projector")


def _two_linears(fields: Fields, *, vision: int, text: int) -> tuple[Parameter, ...]:
    """From the states of one tower layer, or of several side by side, to the text's width."""
    layers, bias = fields.raw("vision_feature_layer"), fields.flag("multimodal_projector_bias")
    listed = layers if isinstance(layers, list) else [layers]
    if not listed or any(type(index) is not int for index in listed):
        raise ConfigError(
            f"vision_feature_layer={shown(layers)} is not allowed: a layer number or a list of them"
        )
    activation(fields, "projector_hidden_act")
    return (
        *head_linear("linear_1", out=text, into=vision * len(listed), bias=bias),
        *head_linear("linear_2", out=text, into=text, bias=bias),
    )


def read_llava(fields: Fields) -> Model:
    """LLaVA (arXiv:2304.08485); pixtral-12b too. Tied where the config or its text says so."""
    head = chosen_head(fields, "LlavaForConditionalGeneration", "LlavaModel") != "LlavaModel"
    strategy = fields.raw("vision_feature_select_strategy")
    check_choice("vision_feature_select_strategy", strategy, ("default", "full"))
    tower, _ = tower_of(fields, TOWERS, "clip_vision_model", absent=LLAVA_VISION)
    text, _ = text_of(fields, "llama")
    linears = _two_linears(fields, vision=tower.hidden_size, text=text.hidden_size)
    base = "model." if head else ""
    return wrapped(
        fields,
        text,
        *_beside(base, tower, *linears),
        base=f"{base}language_model",
        tie=fields.flag("tie_word_embeddings") or text.tie_word_embeddings,
        head=head,
    )


def read_mistral3(fields: Fields) -> Model:
    """Mistral 3: pixtral's tower, neighbouring patches merged. Tied unless its own flag is off."""
    head = chosen_head(fields, "Mistral3ForConditionalGeneration", "Mistral3Model")
    tower, _ = tower_of(fields, TOWERS, "pixtral", absent=MISTRAL3_VISION)
    text, inner = text_of(fields, "mistral", absent=MISTRAL3_TEXT)
    with named("text_config"):
        inner.number("rms_norm_eps")  # the projector's norm takes it
    v, merged = tower.hidden_size, fields.size("spatial_merge_size") ** 2
    base = "" if head == "Mistral3Model" else "model."
    return wrapped(
        fields,
        text,
        *_beside(
            base,
            tower,
            tensor("norm.weight", v, group="norm"),
            *head_linear("patch_merger.merging_layer", out=v, into=v * merged, bias=False),
            *_two_linears(fields, vision=v, text=text.hidden_size),
        ),
        base=f"{base}language_model",
        tie=fields.flag("tie_word_embeddings"),
        head=head != "Mistral3Model",
    )


def read_gemma3(fields: Fields) -> Model:
    """Gemma 3: patches pooled to `mm_tokens_per_image`. Tied unless its own flag is off."""
    head = chosen_head(fields, "Gemma3ForConditionalGeneration", "Gemma3Model")
    towers = {name: tower for name, tower in TOWERS.items() if name != "pixtral"}
    tower, _ = tower_of(fields, towers, "siglip_vision_model")
    text, _ = text_of(fields, "gemma3_text", only=True)
    fields.size("mm_tokens_per_image")
    v = tower.hidden_size
    base = "" if head == "Gemma3Model" else "model."
    return wrapped(
        fields,
        text,
        *_beside(
            base,
            tower,
            tensor("mm_input_projection_weight", v, text.hidden_size),
            tensor("mm_soft_emb_norm.weight", v, group="norm"),
        ),
        base=f"{base}language_model",
        tie=fields.flag("tie_word_embeddings"),
        head=head != "Gemma3Model",
    )


def read_llama4(fields: Fields) -> Model:
    """Llama 4: a whole causal LM inside, tied as its own config says."""
    chosen_head(fields, "Llama4ForConditionalGeneration")
    only = {"llama4_vision_model": llama4_vision}
    tower, vision = tower_of(fields, only, "llama4_vision_model", only=True)
    text, _ = text_of(fields, "llama4_text", only=True)
    with named("vision_config"):
        width = vision.size("vision_output_dim")
    linear = head_linear("linear_1", out=text.hidden_size, into=width, bias=False)
    projector = Tower(part="projector", outer=linear)
    return wrapped(
        fields,
        text,
        inside(tower, "vision_model"),
        inside(projector, "multi_modal_projector"),
        base="language_model.model",
        tie=text.tie_word_embeddings,
        head=True,
        head_name="language_model.lm_head",
    )


READERS = {
    "gemma3": read_gemma3,
    "llama4": read_llama4,
    "llava": read_llava,
    "mistral3": read_mistral3,
}
