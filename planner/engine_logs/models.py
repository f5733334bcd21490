"""A model's name in a log → the catalogue's model, quantised as the name says.

Paths and names of a log are never opened or asked for: a log is someone else's text.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from planner.errors import ConfigError
from planner.huggingface import read_config
from planner.loading import catalogue, load_config
from planner.model import Model

ALIKE = {
    "llama-3.3-70b": "llama-3.1-70b",
    "granite-3.3-8b": "granite-3.1-8b",
    "granite-3.2-8b": "granite-3.1-8b",
    "deepseek-r1-distill-llama-8b": "llama-3.1-8b",
    "deepseek-r1-distill-llama-70b": "llama-3.1-70b",
    "deepseek-r1-distill-qwen-7b": "qwen2.5-7b",
    "deepseek-r1-distill-qwen-14b": "qwen2.5-14b",
    "deepseek-r1-distill-qwen-32b": "qwen2.5-32b",
    "qwq-32b": "qwen2.5-32b",
    "mistral-nemo": "mistral-nemo-12b",
    "mistral-nemo-base": "mistral-nemo-12b",
    "qwen3-coder-30b-a3b": "qwen3-30b-a3b",
    **{f"qwen2-{size}": f"qwen2.5-{size}" for size in ("0.5b", "1.5b", "7b", "72b")},
}
"""Models of one shape by their short names."""

PADDED = {"qwen2.5-72b": {"intermediate_size": 29696}}
"""What published 4-bit files changed in the config, to cut groups of 128 over 8 GPUs."""

_DECORATION = re.compile(
    r"[-.](?:instruct|chat|it|hf|base|thinking|preview|pt|inst|2\d0\d|20\d{4}|awq|gptq|int4|int8|fp8|"
    r"dynamic|quantized|quantised|w4a16|w8a8|w8a16|marlin|4bit|8bit|bnb|nf4|g128|sym|asym|block)"
    r"(?=$|[-.])|^meta-"
)

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}
GPTQ_4 = {"quant_method": "gptq", "bits": 4, "group_size": 128}
GPTQ_8 = {"quant_method": "gptq", "bits": 8, "group_size": 128}
FP8_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def compressed(kind: str) -> dict[str, Any]:
    """compressed-tensors with a scale for each channel of 8-bit weights; the head stays."""
    name = "float-quantized" if kind == "float" else "int-quantized"
    weights = {"num_bits": 8, "type": kind, "strategy": "channel", "symmetric": True}
    inputs = {**weights, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def short_name(name: str) -> str:
    """A repository's or folder's name without owner, tuning and format."""
    hub = re.search(r"models--[^/\\]{1,200}?--([^/\\]{1,200})", name)
    last = hub[1] if hub else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
    short = last.lower().replace("_", "-")
    for _ in range(8):
        shorter = _DECORATION.sub("", short).strip("-.")
        if shorter == short:
            break
        short = shorter
    return short


def in_catalogue(name: str) -> str | None:
    """The catalogue's name of this model; None where it has none of its shape."""
    short = short_name(name)
    for candidate in (short, ALIKE.get(short, ""), re.sub(r"-v0\.\d$", "", short)):
        if candidate in catalogue():
            return candidate
    return None


def quantisation(name: str, given: str | None) -> dict[str, Any] | None:
    """The quantization_config that a name and the engine's `quantization` speak of.

    None: none, or one that is not guessed. Group sizes are those of nearly all published files.
    """
    words = f"{name} {given or ''}".lower()
    if "awq" in words:
        return AWQ
    if "w8a8" in words:
        return compressed("int")
    if "gptq" in words or "w4a16" in words:
        return GPTQ_8 if re.search(r"int8|8bit|w8a16", words) else GPTQ_4
    if "fp8" in name.lower():
        return FP8_BLOCKS if re.search(r"qwen3|deepseek", words) else compressed("float")
    return None


def model_of_log(name: str, given: str | None) -> tuple[Model, str] | None:
    """The model, and what was assumed for it; None where the catalogue has none like it."""
    found = in_catalogue(name)
    if found is None:
        return None
    _, config = load_config(found)
    assumed = []
    quantised = None if config.get("quantization_config") else quantisation(name, given)
    if quantised is not None:
        packed = quantised["quant_method"] in ("awq", "gptq")
        config = {**config, **(PADDED.get(found, {}) if packed else {})}
        config["quantization_config"] = quantised
        assumed.append(f"its weights quantised by {quantised['quant_method']}, as its name says")
    try:
        return replace(read_config(config), name=found), "; ".join(assumed)
    except ConfigError:
        return None
