"""config.json → Model: one reader per model_type; other types are refused."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from planner.errors import ConfigError, shown
from planner.huggingface import (
    alibi_like,
    contrastive,
    conv_hybrids,
    deepseek,
    deepseek_v4,
    encoder_decoders,
    encoders,
    gemma4,
    gemma4_multimodal,
    gemma_later,
    glm5_next,
    gpt2,
    gpt_learned,
    gpt_like,
    later_decoders,
    later_mistral,
    later_mixtures,
    linear_attention,
    llama4_dbrx,
    llama_like,
    mamba_like,
    mistral_large4,
    multimodal,
    norms_and_mixtures,
    qwen_gemma,
    qwen_kimi_vision,
    qwen_vision,
    qwen_vl,
    recurrent_hybrids,
    rotary_vision,
    sparse_latent,
    vision,
)
from planner.huggingface.fields import Fields
from planner.model import Model

READERS: dict[str, Callable[[Fields], Model]] = {
    **alibi_like.READERS,
    **conv_hybrids.READERS,
    **contrastive.READERS,
    **deepseek.READERS,
    **deepseek_v4.READERS,
    **encoder_decoders.READERS,
    **encoders.READERS,
    **gemma4.READERS,
    **gemma4_multimodal.READERS,
    **gemma_later.READERS,
    **glm5_next.READERS,
    **gpt2.READERS,
    **gpt_learned.READERS,
    **gpt_like.READERS,
    **later_decoders.READERS,
    **later_mistral.READERS,
    **later_mixtures.READERS,
    **linear_attention.READERS,
    **llama4_dbrx.READERS,
    **llama_like.READERS,
    **mamba_like.READERS,
    **mistral_large4.READERS,
    **multimodal.READERS,
    **norms_and_mixtures.READERS,
    **qwen_gemma.READERS,
    **qwen_kimi_vision.READERS,
    **qwen_vision.READERS,
    **qwen_vl.READERS,
    **recurrent_hybrids.READERS,
    **rotary_vision.READERS,
    **sparse_latent.READERS,
    **vision.READERS,
}
"""The reader of every model_type that has one."""


def read_config(config: Mapping[str, Any]) -> Model:
    """A Model from the content of a config.json.

    Absent fields take the default of that type's class in transformers and are listed in
    `Model.defaults`. Raises ConfigError for a type without a reader and for values out of range.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"config={shown(config)} is not allowed: a JSON object")
    model_type = config.get("model_type")
    if model_type is None:
        raise ConfigError("model_type is missing from the config: it names the architecture")
    if not isinstance(model_type, str) or model_type not in READERS:
        near = difflib.get_close_matches(str(model_type), READERS, n=3, cutoff=0.4)
        known = ", ".join(near or sorted(READERS))
        raise ConfigError(
            f"model_type={shown(model_type)} has no reader (`planner params --traced` reads it off "
            f"transformers): the nearest known are {known}"
        )
    return READERS[model_type](Fields(config, model_type))
