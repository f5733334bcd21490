"""GGUF metadata → the config.json that transformers would make of it (integrations/ggml.py).

The file says less than a config.json: what it leaves out is read off its tensors, as transformers
and llama.cpp do. Rotary factors that it keeps as a tensor (llama3, longrope) are not read: no size
depends on them. A quantised file gets `quantization_config` and the dtype fp16, llama.cpp's cache.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from planner.errors import MAX_LAYERS, ConfigError, check_size, shown
from planner.headers.gguf_files import GgufHeader
from planner.headers.stored import dtype_mix

PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
FIELDS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_used_count": "num_experts_per_tok",
}
REQUIRED = ("block_count", "embedding_length", "attention.head_count", "context_length")
ALWAYS_TIED = ("falcon", "bloom")
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Blocks of the two whose queries are scaled by hidden_size / heads; llama.cpp tells them so."""


class Described:
    """The metadata of one architecture, and the shapes of the tensors."""

    def __init__(self, header: GgufHeader, architecture: str) -> None:
        self.header, self.architecture = header, architecture
        self.shapes = {tensor.name: tensor.shape for tensor in header.tensors}

    def get(self, key: str) -> Any:
        """A value under the architecture's own prefix, or None."""
        value = self.header.metadata.get(f"{self.architecture}.{key}")
        # float32 → the decimal number that was meant
        return float(f"{value:.7g}") if isinstance(value, float) else value

    def has(self, name: str) -> bool:
        """Whether block 0 has such a tensor."""
        return f"blk.0.{name}" in self.shapes

    def size(self, key: str) -> int | None:
        """A whole number above 0, or None where it is absent; ConfigError for anything else."""
        value = self.get(key)
        return None if value is None else check_size(f"{self.architecture}.{key}", value)

    def required(self, key: str) -> int:
        """A whole number above 0."""
        size = self.size(key)
        if size is None:
            raise ConfigError(f"{self.architecture}.{key} is missing from the metadata")
        return size

    def width(self, name: str) -> int | None:
        """Rows of such a tensor in the first block that has one, of each expert if of experts."""
        for index in range(min(self.required("block_count"), MAX_LAYERS)):
            shape = self.shapes.get(f"blk.{index}.{name}", ())
            if len(shape) >= 2:
                return shape[-2]
        return None


def config_from_gguf(header: GgufHeader, *, origin: str) -> dict[str, Any]:
    """A config.json's content; ConfigError for an architecture that is not read."""
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        near = difflib.get_close_matches(str(architecture), ARCHITECTURES, n=3, cutoff=0.4)
        raise ConfigError(
            f"{origin}: general.architecture={shown(architecture)} is not read: "
            f"{', '.join(near or sorted(ARCHITECTURES))}"
        )
    described = Described(header, architecture)
    for key in REQUIRED:
        described.required(key)
    model_type, special = ARCHITECTURES[architecture]
    config: dict[str, Any] = {"model_type": model_type}
    for key, field in FIELDS.items():
        value = described.get(key)
        if value is not None:
            config[field] = value
    kv_heads = described.get("attention.head_count_kv")
    config["num_key_value_heads"] = kv_heads or described.get("attention.head_count")
    config["vocab_size"] = _vocabulary(described, origin)
    config["tie_word_embeddings"] = (
        "output.weight" not in described.shapes or architecture in ALWAYS_TIED
    )
    config |= _rope_scaling(described) | _stored_as(header) | special(described)
    return config


def _vocabulary(described: Described, origin: str) -> int:
    """Rows of the embedding, which may be padded beyond the list of tokens."""
    embedding = described.shapes.get("token_embd.weight")
    if embedding is not None and len(embedding) == 2:
        return embedding[0]
    tokens = described.header.lengths.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise ConfigError(f"{origin}: neither token_embd.weight nor a list of tokens is there")
    return tokens


def _rope_scaling(described: Described) -> dict[str, Any]:
    kind, factor = described.get("rope.scaling.type"), described.get("rope.scaling.factor")
    if kind not in ("linear", "yarn") or factor is None:
        return {}
    scaling = {"rope_type": kind, "factor": factor}
    original = described.get("rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    multiplier = described.get("rope.scaling.yarn_log_multiplier")
    if isinstance(multiplier, float):
        scaling["mscale_all_dim"] = float(f"{10 * multiplier:.6g}")
    return {"rope_scaling": scaling}


def _stored_as(header: GgufHeader) -> dict[str, Any]:
    matrices = dtype_mix(tensor for tensor in header.tensors if len(tensor.shape) >= 2)
    if all(share.dtype in PLAIN for share in matrices):
        return {"dtype": PLAIN[matrices[0].dtype] if matrices else "float32"}
    held = {share.dtype: [share.tensors, share.size_bytes] for share in dtype_mix(header.tensors)}
    quantised = {"quant_method": "gguf", "tensors": held}
    return {"dtype": "float16", "quantization_config": quantised}


def _head_dim(d: Described) -> dict[str, Any]:
    rows = d.width("attn_q.weight")
    of_rows = None if rows is None else rows // d.required("attention.head_count")
    return {"head_dim": d.size("attention.key_length") or of_rows}


def _llama(d: Described) -> dict[str, Any]:
    """Mixtral is a llama with experts here."""
    stated = d.get("attention.key_length") or d.get("rope.dimension_count")
    config: dict[str, Any] = {"head_dim": stated} if stated else _head_dim(d)
    if d.get("expert_count"):
        return {**config, "model_type": "mixtral", "num_local_experts": d.get("expert_count")}
    biases = {"attention_bias": d.has("attn_q.bias"), "mlp_bias": d.has("ffn_up.bias")}
    return {**config, **biases}


def _mistral(d: Described) -> dict[str, Any]:
    return {**_head_dim(d), "sliding_window": d.get("attention.sliding_window")}


def _gemma(d: Described) -> dict[str, Any]:
    config = _head_dim(d)
    for key in ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"):
        if d.get(key) is not None:
            config[key.removeprefix("attention.")] = d.get(key)
    if d.get("block_count") == GEMMA_27B.get(d.architecture):
        heads = d.required("attention.head_count")
        config["query_pre_attn_scalar"] = d.required("embedding_length") // heads
    return config


def _qwen_mixture(d: Described) -> dict[str, Any]:
    config = {
        "num_experts": d.get("expert_count"),
        "moe_intermediate_size": d.get("expert_feed_forward_length")
        or d.width("ffn_up_exps.weight"),
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }
    if d.architecture == "qwen3moe":
        return {**config, **_head_dim(d), "norm_topk_prob": True}  # llama.cpp always does
    shared = d.get("expert_shared_feed_forward_length") or d.width("ffn_up_shexp.weight")
    return {
        **config,
        "shared_expert_intermediate_size": shared,
        "qkv_bias": d.has("attn_q.bias"),
    }


def _deepseek(d: Described) -> dict[str, Any]:
    """V2 or V3, by the router; key and value lengths are those before the latent was absorbed."""
    rope = d.required("rope.dimension_count")
    key = d.size("attention.key_length_mla") or d.required("attention.key_length")
    sigmoid = d.get("expert_gating_func") == 2 or any("exp_probs_b" in name for name in d.shapes)
    width = d.get("expert_feed_forward_length")
    config = {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "num_key_value_heads": d.get("attention.head_count"),
        "q_lora_rank": d.get("attention.q_lora_rank"),
        "kv_lora_rank": d.get("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": key - rope,
        "v_head_dim": d.get("attention.value_length_mla") or d.get("attention.value_length"),
        "first_k_dense_replace": d.get("leading_dense_block_count") or 0,
        "n_routed_experts": d.get("expert_count"),
        "n_shared_experts": d.get("expert_shared_count"),
        "moe_intermediate_size": width or d.width("ffn_up_exps.weight"),
        "n_group": d.get("expert_group_count") or 1,
        "topk_group": d.get("expert_group_used_count") or 1,
    }
    for theirs, ours in (
        ("expert_weights_scale", "routed_scaling_factor"),
        ("expert_weights_norm", "norm_topk_prob"),
    ):
        if d.get(theirs) is not None:
            config[ours] = d.get(theirs)
    return config


def _epsilon(name: str) -> Callable[[Described], dict[str, Any]]:
    def read(d: Described) -> dict[str, Any]:
        eps = d.get("attention.layer_norm_epsilon") or d.get("attention.layer_norm_rms_epsilon")
        return {} if eps is None else {name: eps}

    return read


def _falcon(d: Described) -> dict[str, Any]:
    heads, kv_heads = d.get("attention.head_count"), d.get("attention.head_count_kv") or 1
    two_norms = d.has("attn_norm_2.weight")
    new = two_norms or kv_heads not in (1, heads)
    return {
        **_epsilon("layer_norm_epsilon")(d),
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if two_norms else 1) if new else None,
        "bias": d.has("attn_qkv.bias"),
        "ffn_hidden_size": d.get("feed_forward_length"),
    }


def _partial_rotary(d: Described) -> dict[str, Any]:
    rotary, key = d.size("rope.dimension_count"), d.size("attention.key_length")
    if rotary is None:
        return {}
    width = key or d.required("embedding_length") / d.required("attention.head_count")
    return {"partial_rotary_factor": rotary / width}


def _stablelm(d: Described) -> dict[str, Any]:
    return {
        **_epsilon("layer_norm_eps")(d),
        **_partial_rotary(d),
        "use_qkv_bias": d.has("attn_q.bias"),
        "use_parallel_residual": not d.has("ffn_norm.weight"),
        "qk_layernorm": d.has("attn_q_norm.weight"),
    }


def _nemotron(d: Described) -> dict[str, Any]:
    biases = {"attention_bias": d.has("attn_q.bias"), "mlp_bias": d.has("ffn_up.bias")}
    return {**_epsilon("norm_eps")(d), **_partial_rotary(d), **_head_dim(d), **biases}


def _starcoder2(d: Described) -> dict[str, Any]:
    return {
        **_epsilon("norm_epsilon")(d),
        "use_bias": d.has("attn_q.bias"),
        "sliding_window": d.get("attention.sliding_window"),
    }


def _phi3(d: Described) -> dict[str, Any]:
    window = {"sliding_window": d.get("attention.sliding_window")}
    return {**_partial_rotary(d), **window}


def _gpt2(d: Described) -> dict[str, Any]:
    return {**_epsilon("layer_norm_epsilon")(d), "n_inner": d.get("feed_forward_length")}


def _gpt_oss(d: Described) -> dict[str, Any]:
    width = d.get("expert_feed_forward_length") or d.width("ffn_up_exps.weight")
    config = {**_head_dim(d), "num_local_experts": d.get("expert_count")}
    window = d.get("attention.sliding_window")
    return {
        **config,
        "intermediate_size": width,
        **({} if window is None else {"sliding_window": window}),
    }


def _minimax(d: Described) -> dict[str, Any]:
    width = d.get("expert_feed_forward_length") or d.width("ffn_up_exps.weight")
    return {
        **_head_dim(d),
        "num_local_experts": d.get("expert_count"),
        "intermediate_size": width,
        "rotary_dim": d.get("rope.dimension_count"),
    }


ARCHITECTURES: dict[str, tuple[str, Callable[[Described], dict[str, Any]]]] = {
    "bloom": ("bloom", _epsilon("layer_norm_epsilon")),
    "deepseek2": ("deepseek_v2", _deepseek),
    "falcon": ("falcon", _falcon),
    "gemma": ("gemma", _gemma),
    "gemma2": ("gemma2", _gemma),
    "gemma3": ("gemma3_text", _gemma),
    "gpt-oss": ("gpt_oss", _gpt_oss),
    "gpt2": ("gpt2", _gpt2),
    "llama": ("llama", _llama),
    "minimax-m2": ("minimax_m2", _minimax),
    "mistral": ("mistral", _mistral),
    "nemotron": ("nemotron", _nemotron),
    "phi3": ("phi3", _phi3),
    "qwen2": ("qwen2", lambda _: {}),
    "qwen2moe": ("qwen2_moe", _qwen_mixture),
    "qwen3": ("qwen3", _head_dim),
    "qwen3moe": ("qwen3_moe", _qwen_mixture),
    "stablelm": ("stablelm", _stablelm),
    "starcoder2": ("starcoder2", _starcoder2),
}
"""general.architecture → model_type, and what the common fields do not say."""
