"""Write planner/huggingface/defaults.json: what the config classes of transformers take by default.

Run `python tools/huggingface_defaults.py` after changing the pinned transformers; a test fails
until the file says what the installed version says.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODEL_TYPES = (
    "bamba",
    "bart",
    "bert",
    "bloom",
    "camembert",
    "clip",
    "clip_text_model",
    "clip_vision_model",
    "cohere",
    "cohere2",
    "dbrx",
    "deberta",
    "deberta-v2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "dinov2",
    "distilbert",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma3n",
    "gemma3n_audio",
    "gemma3n_text",
    "gemma3n_vision",
    "gemma4",
    "gemma4_audio",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_audio",
    "gemma4_unified_text",
    "gemma4_unified_vision",
    "gemma4_vision",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm5_next",
    "glm5_next_text",
    "glm5_next_vision",
    "glm_moe_dsa",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "jamba",
    "kimi_k25",
    "kimi_k25_vision",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "llama",
    "llama4",
    "llama4_text",
    "llama4_vision_model",
    "llava",
    "mamba",
    "mamba2",
    "mbart",
    "minimax",
    "minimax_m2",
    "ministral",
    "ministral3",
    "mistral",
    "mistral3",
    "mistral4",
    "mistral_large4",
    "mistral_large4_text",
    "mixtral",
    "modernbert",
    "mpnet",
    "mpt",
    "mt5",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "opt",
    "pegasus",
    "phi",
    "phi3",
    "phimoe",
    "pixtral",
    "qwen2",
    "qwen2_5_vl",
    "qwen2_5_vl_text",
    "qwen2_5_vl_vision",
    "qwen2_moe",
    "qwen2_vl",
    "qwen2_vl_text",
    "qwen2_vl_vision",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_moe_vision",
    "qwen3_5_text",
    "qwen3_5_vision",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
    "qwen3_vl_moe_vision",
    "qwen3_vl_text",
    "qwen3_vl_vision",
    "recurrent_gemma",
    "roberta",
    "rwkv",
    "seed_oss",
    "siglip",
    "siglip_text_model",
    "siglip_vision_model",
    "smollm3",
    "stablelm",
    "starcoder2",
    "t5",
    "umt5",
    "vit",
    "whisper",
    "xlm-roberta",
    "zamba2",
)
TARGET = Path(__file__).parents[1] / "planner" / "huggingface" / "defaults.json"
_NOT_ARCHITECTURE = ("dropout", "pdrop", "token_id", "summary_", "initializer", "use_cache")


def class_defaults(model_type: str) -> dict[str, Any]:
    """Field → default of the config class of `model_type`, before its own post-processing."""
    config_class = CONFIG_MAPPING[model_type]
    fields = {
        name: parameter.default
        for name, parameter in inspect.signature(config_class).parameters.items()
        if parameter.default is not inspect.Parameter.empty
        and not any(word in name for word in _NOT_ARCHITECTURE)
    }
    own = {n: d for n, d in fields.items() if n in config_class.__annotations__}
    return {
        "aliases": dict(sorted(config_class.attribute_map.items())),
        "rope_theta": getattr(config_class, "default_theta", 10_000.0),
        "fields": dict(sorted(own.items())),
    }


def all_defaults() -> dict[str, Any]:
    """The content of the file."""
    return {
        "transformers": transformers.__version__,
        "model_types": {name: class_defaults(name) for name in MODEL_TYPES},
    }


if __name__ == "__main__":
    TARGET.write_text(json.dumps(all_defaults(), indent=1) + "\n")
    print(f"wrote {TARGET}")
