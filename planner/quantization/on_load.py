"""Weights that a runtime quantises while it loads them: `Deployment.weight_dtype`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from planner.errors import ConfigError, shown
from planner.quantization import Quantization, read_quantization
from planner.quantization.bitsandbytes import OnLoading
from planner.quantization.torchao import TorchAO

ON_LOAD: dict[str, dict[str, dict[str, Any]]] = {
    # vllm serve --quantization fp8: a scale a tensor; embedding, norms and head stay
    "vllm": {"fp8": {"quant_method": "fp8", "weight_block_size": None}},
    # BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), (load_in_8bit=True)
    "transformers": {
        "nf4": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
        },
        "nf4-double": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
        },
        "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    },
    # finetune/lora.py --quantize bnb.nf4, bnb.nf4-dq: the head is a linear layer like any other
    "litgpt": {
        name: {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": name == "nf4-double",
            "llm_int8_skip_modules": [],
        }
        for name in ("nf4", "nf4-double")
    },
    # gpt-fast's quantize.py --mode int8, --mode int4 --groupsize 32: weights of linear layers, and
    # of experts in int8 (mixtral-moe/quantize.py, which has no int4)
    "attnlab": {
        "int8": {
            "quant_method": "torchao",
            "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2}},
        },
        "int4": {
            "quant_method": "torchao",
            "quant_type": {
                "default": {
                    "_type": "Int4WeightOnlyConfig",
                    "_version": 2,
                    "_data": {"group_size": 32},
                }
            },
        },
    },
}
"""What each runtime can make of plain weights, as the quantization_config that describes it."""


def quantised_on_load(runtime: str, weight_dtype: str) -> Quantization:
    """How the weights lie then; ConfigError for what the runtime does not do on loading."""
    known = ON_LOAD.get(runtime, {})
    if weight_dtype not in known:
        allowed = ", ".join(known) or "none but dtype"
        raise ConfigError(
            f"weight_dtype={shown(weight_dtype)} is not what {runtime} quantises to on loading: "
            f"{allowed}"
        )
    made = read_quantization(known[weight_dtype])
    assert made is not None
    if isinstance(made, OnLoading):
        return replace(made, on_load=True)
    if isinstance(made, TorchAO) and runtime == "attnlab" and weight_dtype == "int8":
        return replace(made, experts=True)
    return made
