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
    "bloom",
    "cohere",
    "cohere2",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "llama",
    "llama4_text",
    "minimax_m2",
    "ministral",
    "mistral",
    "mixtral",
    "mpt",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
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
