"""Tiny configs of every family that has a reader, and the live oracle built from them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import planner

SMALL_PARAMETERS = 4_000_000
transformers.logging.set_verbosity_error()

BASE: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
TINY: dict[str, dict[str, Any]] = {
    "llama": {**BASE, "model_type": "llama"},
    "llama with biases, tied": {
        **BASE,
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral sliding": {**BASE, "model_type": "mistral", "sliding_window": 16},
    "mistral sliding, one kv head": {
        **BASE,
        "model_type": "mistral",
        "sliding_window": 64,
        "num_key_value_heads": 1,
    },
    "gemma2 without sliding layers": {
        **BASE,
        "model_type": "gemma2",
        "head_dim": 16,
        "layer_types": ["full_attention"] * 3,
    },
    "mistral full, wide heads": {
        **BASE,
        "model_type": "mistral",
        "sliding_window": None,
        "head_dim": 24,
    },
    "qwen2": {**BASE, "model_type": "qwen2", "sliding_window": 8},
    "qwen2 sliding from layer 1": {
        **BASE,
        "model_type": "qwen2",
        "sliding_window": 8,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
    "gemma2": {**BASE, "model_type": "gemma2", "head_dim": 16, "sliding_window": 16},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 100,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 512,
    },
    "phi3": {**BASE, "model_type": "phi3", "pad_token_id": 0, "sliding_window": 20},
    "mixtral": {**BASE, "model_type": "mixtral", "num_local_experts": 4},
    "deepseek_v3": {
        **BASE,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}


def build(
    config: dict[str, Any],
    *,
    device: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
) -> Any:
    """The transformers model of a config, in eval mode, with random weights.

    A small one is built on the CPU, where it runs faster: ops of the meta device are Python.
    """
    if device is None:
        small = planner.read_config(config).parameter_count < SMALL_PARAMETERS
        device = "cpu" if small else "meta"
    arguments = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")}
    described = AutoConfig.for_model(**arguments)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            described, dtype=dtype, attn_implementation=attention
        )
    return model.eval()
