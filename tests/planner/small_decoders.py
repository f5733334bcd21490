"""Small random configs of transformers' decoders, and what their classes hold when they run."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as hf
from hypothesis import strategies as st
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from profiles.meters import LiveTensorMeter

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
TORCH_DTYPES = {**DTYPES, "fp16": torch.float16}
EAGER_ONLY = ("bloom", "gemma2")
KEPT_OPS = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
"""What selective checkpointing keeps on a CPU."""
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
DROPOUTS = (
    "attention_dropout", "attn_pdrop", "dropout", "embd_pdrop", "hidden_dropout", "layerdrop",
    "resid_pdrop", "residual_dropout", "activation_dropout", "embedding_dropout",
    "attention_probs_dropout_prob", "dropout_rate", "hidden_dropout_prob",
)  # fmt: skip
GROUPED = (
    "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "granite", "llama", "mistral", "mixtral", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "phi",
    "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm",
    "starcoder2",
)  # fmt: skip
"""Types whose configs name keys and values heads as llama's does."""
OWN_HEAD_DIM = (
    "ernie4_5", "gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen3", "qwen3_moe",
    "seed_oss",
)  # fmt: skip
MIXTURES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
WINDOWED = ("mistral", "mixtral", "phi3", "starcoder2")
SLIDING = ("cohere2", "exaone4", "gemma2", "gemma3_text", "olmo3")
OTHERS = ("bloom", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "opt")
KINDS = (*GROUPED, *OTHERS)
LATENT = ("deepseek_v2", "deepseek_v3")
"""Types whose inference alone is planned."""
SCANNED = ("bamba",)
"""Such with Mamba-2 layers."""


@st.composite
def decoders(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> dict[str, Any]:
    """A config with a handful of layers, heads and words."""
    kind = draw(st.sampled_from(kinds))
    vocabulary, layers = draw(st.integers(3, 120)), draw(st.integers(1, 4))
    groups, shared = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = 8 * draw(st.integers(1, 3))
    H, wide = groups * shared, draw(st.integers(1, 90))
    tied = draw(st.booleans())
    made = {"model_type": kind, "vocab_size": vocabulary, "tie_word_embeddings": tied, **NO_TOKENS}
    if kind in LATENT:
        made["intermediate_size"] = wide
        return {**made, **_latent(draw, kind, layers, H)}
    if kind in SCANNED:
        made["intermediate_size"] = wide
        return {**made, **_scanned(draw, layers, (H, groups, head_dim))}
    if kind in OTHERS:
        return {**made, **_other(draw, kind, layers, (H, groups, head_dim), wide)}
    made |= {
        "hidden_size": H * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": H,
        "num_key_value_heads": groups,
        "intermediate_size": wide,
        "max_position_embeddings": 128,
    }
    if kind in OWN_HEAD_DIM:
        made["head_dim"] = 2 * draw(st.integers(1, 8))
    if kind in ("glm", "glm4", "nemotron", "qwen3_moe"):
        made["head_dim"] = head_dim
    if kind in WINDOWED:
        made["sliding_window"] = draw(st.none() | st.integers(2, 40))
    if kind in SLIDING:
        made["sliding_window"] = draw(st.integers(2, 40))
    if kind in ("gemma2", "gemma3_text"):
        made["query_pre_attn_scalar"] = 16
    if kind == "llama":
        made |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    if kind in ("cohere", "stablelm", "phi"):
        field = "use_qk_norm" if kind == "cohere" else "qk_layernorm"
        made[field] = draw(st.booleans())
    if kind == "stablelm":
        made["use_parallel_residual"] = draw(st.booleans())
    if kind in MIXTURES:  # grouped products want rows of 16 bytes
        made |= {"hidden_size": 8 * H, "intermediate_size": 8 * (1 + wide // 8)}
    if kind in ("olmo", "olmoe"):
        made["clip_qkv"] = draw(st.none() | st.just(4.0))
    if kind in MIXTURES:
        experts = draw(st.integers(2, 6))
        field = "num_local_experts" if kind == "mixtral" else "num_experts"
        made |= {field: experts, "num_experts_per_tok": draw(st.integers(1, experts))}
    if kind in ("olmoe", "qwen2_moe", "qwen3_moe"):
        made["norm_topk_prob"] = draw(st.booleans())
    if kind in ("qwen2_moe", "qwen3_moe"):
        made["moe_intermediate_size"] = 8 * draw(st.integers(1, 5))
    if kind == "qwen2_moe":
        made["shared_expert_intermediate_size"] = draw(st.integers(1, 60))
    return made


def _latent(draw: st.DrawFn, kind: str, layers: int, heads: int) -> dict[str, Any]:
    """DeepSeek's latent attention and its mixtures, whose groups have two experts or more."""
    groups, experts = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    widths = ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
    made = {
        **{field: 8 * draw(st.integers(1, 4)) for field in widths},
        "hidden_size": 8 * heads * draw(st.integers(1, 3)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 128,
        "q_lora_rank": draw(st.none() | st.integers(1, 40)),
        "qk_rope_head_dim": 2 * draw(st.integers(1, 8)),
        "attention_bias": draw(st.booleans()),
        "n_routed_experts": groups * experts,
        "n_shared_experts": draw(st.integers(1, 2)),
        "n_group": groups,
        "topk_group": draw(st.integers(1, groups)),
        "moe_intermediate_size": 8 * draw(st.integers(1, 5)),
        "first_k_dense_replace": draw(st.integers(0, 2)),
    }
    made["num_experts_per_tok"] = draw(st.integers(1, made["topk_group"] * experts))
    made["head_dim"] = made["qk_rope_head_dim"]
    if kind == "deepseek_v2":
        methods = ("greedy", "group_limited_greedy")
        made |= {"topk_method": draw(st.sampled_from(methods)), "mlp_bias": draw(st.booleans())}
    else:
        made["norm_topk_prob"] = draw(st.booleans())
        made["rope_interleave"] = draw(st.booleans())
    return made


def _scanned(draw: st.DrawFn, layers: int, heads: tuple[int, int, int]) -> dict[str, Any]:
    """Mamba-2 layers, and one that attends or more; short chunks, so that prompts have several."""
    H, G, D = heads
    expand, groups = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    mixing = [n for n in range(groups, 13, groups) if expand * H * D % n == 0]
    return {
        "hidden_size": H * D,
        "num_hidden_layers": layers,
        "num_attention_heads": H,
        "num_key_value_heads": G,
        "max_position_embeddings": 128,
        "attn_layer_indices": sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1))),
        "mamba_chunk_size": draw(st.integers(2, 16)),
        "mamba_n_heads": draw(st.sampled_from(mixing)),
        "mamba_d_head": "auto",
        "mamba_expand": expand,
        "mamba_n_groups": groups,
        "mamba_d_state": draw(st.integers(2, 24)),
        "mamba_d_conv": draw(st.integers(1, 5)),
        "mamba_conv_bias": draw(st.booleans()),
        "mamba_proj_bias": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
    }


def _other(
    draw: st.DrawFn, kind: str, layers: int, heads: tuple[int, int, int], wide: int
) -> dict[str, Any]:
    H, _, D = heads
    match kind:
        case "bloom":
            return {"hidden_size": H * D, "n_layer": layers, "n_head": H}
        case "gpt2":
            sizes = {"n_embd": H * D, "n_layer": layers, "n_head": H, "n_inner": wide}
            return {**sizes, "n_positions": 64}
        case "gpt_bigcode":
            sizes = {"n_embd": H * D, "n_layer": layers, "n_head": H, "n_inner": wide}
            return {**sizes, "n_positions": 64, "multi_query": draw(st.booleans())}
        case "gpt_neox":
            return {
                "hidden_size": H * D,
                "num_hidden_layers": layers,
                "num_attention_heads": H,
                "intermediate_size": wide,
                "use_parallel_residual": draw(st.booleans()),
                "max_position_embeddings": 64,
            }
        case "opt":
            before = draw(st.booleans())
            return {
                "hidden_size": H * D,
                "num_hidden_layers": layers,
                "num_attention_heads": H,
                "ffn_dim": wide,
                "do_layer_norm_before": before,
                "word_embed_proj_dim": H * D if before else 4 * draw(st.integers(1, 8)),
                "max_position_embeddings": 64,
                "pad_token_id": 1,
            }
        case _:
            return _falcon(draw, layers, heads, wide)


def _falcon(draw: st.DrawFn, layers: int, heads: tuple[int, int, int], wide: int) -> dict[str, Any]:
    H, G, D = max(2, heads[0]), heads[1], heads[2]  # one head alone: two layouts look alike
    kind = draw(st.sampled_from(("grouped", "one head", "all heads, alibi")))
    made = {
        "hidden_size": H * D,
        "num_hidden_layers": layers,
        "num_attention_heads": H,
        "ffn_hidden_size": wide,
        "bias": draw(st.booleans()),
        "max_position_embeddings": 64,
    }
    if kind == "grouped":
        kv_heads = G if G != H and H % G == 0 else 1
        return {**made, "new_decoder_architecture": True, "num_kv_heads": kv_heads}
    if kind == "one head":
        return {**made, "multi_query": True, "parallel_attn": draw(st.booleans())}
    return {**made, "multi_query": False, "alibi": True, "parallel_attn": draw(st.booleans())}


def described(config: dict[str, Any]) -> hf.PretrainedConfig:
    """As transformers reads it, without dropout."""
    fields = dict(config)
    made = hf.AutoConfig.for_model(fields.pop("model_type"), **fields)
    for field in DROPOUTS:
        if getattr(made, field, None):
            setattr(made, field, 0.0)
    return made


def built(config: hf.PretrainedConfig, dtype: str, attention: str) -> torch.nn.Module:
    """The class with random weights."""
    return hf.AutoModelForCausalLM.from_config(
        config, dtype=TORCH_DTYPES[dtype], attn_implementation=attention
    )


def words(config: hf.PretrainedConfig, batch: int, tokens: int) -> torch.Tensor:
    """Random token ids [B, T]."""
    return torch.randint(0, config.get_text_config().vocab_size, (batch, tokens))


def takes_padding(config: dict[str, Any]) -> bool:
    """Whether padding masks of this config are planned."""
    return config["model_type"] not in SCANNED


def padding(batch: int, tokens: int) -> torch.Tensor:
    """A mask [B, T] that hides a token that every window still sees.

    Behind the windows of a model without full layers, padding that has left them is not masked.
    """
    mask = torch.ones(batch, tokens, dtype=torch.long)
    mask[:, max(0, tokens - 2)] = 0
    return mask


def inference_peaks(
    live: torch.nn.Module,
    batch: int,
    tokens: int,
    *,
    steps: int,
    last: bool = False,
    capacity: int | None = None,
    padded: bool = False,
) -> list[int]:
    """Peaks of a prefill and the decode steps behind it; of the last logits alone if `last`.

    `capacity`: in a StaticCache of so many tokens. `padded`: behind a mask.
    """
    ids, seen = words(live.config, batch, tokens), []
    kept = {"logits_to_keep": 1} if last else {}
    masks = [padding(batch, tokens + count) if padded else None for count in range(1 + steps)]
    with torch.no_grad(), LiveTensorMeter() as meter:
        cache, step = None, ids
        if capacity is not None:
            cache = hf.StaticCache(config=live.config, max_cache_len=capacity)
        for mask in masks:
            meter.reset_peak()
            out = live(step, attention_mask=mask, past_key_values=cache, use_cache=True, **kept)
            cache, step = out.past_key_values, ids[:, :1]
            seen.append(meter.peak_bytes)
            del out
    return seen


CHECKPOINTING = st.sampled_from(
    (("none", 1), ("none", 1), ("full", 1), ("full", 1), ("full", 2), ("full", 3), ("selective", 1))
)
"""Training's `checkpointing` and `checkpoint_every`."""


def checkpoint(live: torch.nn.Module, how: tuple[str, int]) -> None:
    """Turn it on in the class; selective by torch's contexts, which transformers passes on."""
    (which, every), kwargs = how, None
    if which == "none":
        return
    if which == "selective":
        contexts = partial(create_selective_checkpoint_contexts, KEPT_OPS)
        kwargs = {"use_reentrant": False, "context_fn": contexts}
    live.activation_checkpointing_enable(kwargs, every_n_layers=every)


def keep_every(live: torch.nn.Module, every: int) -> None:
    """Selective checkpointing that keeps one matrix product in so many, as torchtitan's "op"."""

    def contexts() -> Any:
        seen = {True: 0, False: 0}

        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            kept = op in KEPT_OPS
            if op == torch.ops.aten.mm.default:
                seen[context.is_recompute] += 1
                kept = every == 1 or seen[context.is_recompute] % every == 1
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    kwargs = {"use_reentrant": False, "context_fn": contexts}
    live.activation_checkpointing_enable(kwargs)


def training_meter(
    live: torch.nn.Module,
    batch: int,
    tokens: int,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    padded: bool = False,
) -> LiveTensorMeter:
    """The meter after a step of which only the loss was kept."""
    ids = words(live.config, batch, tokens)
    mask = padding(batch, tokens) if padded else None
    with LiveTensorMeter() as meter:
        loss = live(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return meter
