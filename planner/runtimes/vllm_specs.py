"""What each layer declares to vLLM's pool: bytes of a token's keys and values, or one state.

v1/kv_cache_interface.py and the layers' get_kv_cache_spec, vLLM 0.19.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from planner.dtypes import element_bytes
from planner.errors import ConfigError
from planner.kv_cache import attention_cache_elements, mixer_kind
from planner.layers import GQA, MLA, Layer
from planner.mixers import Mixer
from planner.mixers.recurrent import SharedAttention
from planner.model import Model
from planner.program import Number, maximum, minimum
from planner.runtimes.vllm_states import state_bytes

Keeps = Literal["all", "window", "chunk", "encoder", "state"]

LATENT_TYPES = (
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "glm4_moe_lite",
    "glm_moe_dsa",
    "kimi_linear",
)
"""Text types whose latents vLLM keeps (is_deepseek_mla, model_arch_config_convertor.py)."""

SPARSE_TYPES = ("deepseek_v32", "glm_moe_dsa")
SPARSE_BLOCK_TOKENS = 64  # FLASHMLA_SPARSE and the indexer take no other
SPARSE_LATENT = (512, 64)  # d_c, d_rope: FlashMLASparseBackend's only head size, 576
FP8_DS_MLA_BYTES = 656
"""fp8_ds_mla: 512 fp8 of a latent, four float32 scales, 64 bf16 rotary dimensions."""

INDEXER_SCALE_ELEMENTS = 128  # fp8 of the indexer's key that share a float32 scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Spec:
    """The cache of one layer: `token_bytes` for each token it keeps, or `state_bytes` a request.

    `keeps`: "all" tokens, those of the last `span` ("window"), of the running chunk of `span`
    ("chunk"), the "encoder"'s, or one "state" whatever the context.
    """

    kind: str
    keeps: Keeps
    token_bytes: int = 0
    span: int = 0
    state_bytes: int = 0
    latent: bool = False

    def held_blocks(self, tokens: Number, block: int, *, encoder_tokens: int) -> Number:
        """Blocks of one request after the step that made `tokens` tokens.

        Blocks that lie wholly before the window or chunk of that step's token are given back.
        v1/core/single_type_kv_cache_manager.py: get_num_skipped_tokens of each manager.
        """
        if self.keeps == "encoder":
            return -(-encoder_tokens // block)
        if self.keeps == "state":
            return minimum(tokens, 1)
        skipped = 0
        if self.keeps == "window":
            skipped = maximum(0, tokens - self.span)
        elif self.keeps == "chunk":
            skipped = maximum(0, tokens - 1) // self.span * self.span
        return -(-tokens // block) - skipped // block

    def most_blocks(self, tokens: int, block: int, *, batched_tokens: int) -> int:
        """Blocks that one request of `tokens` tokens may need while its prompt comes in chunks.

        max_memory_usage_bytes of each spec: a window keeps what it needs beside a whole chunk of
        `batched_tokens`, and one block more as it need not begin with one.
        """
        match self.keeps:
            case "state":
                return 1
            case "window":
                return -(-min(self.span - 1 + batched_tokens, tokens) // block) + 1
            case "chunk":
                return -(-min(self.span + batched_tokens, tokens) // block)
            case "encoder":
                return -(-batched_tokens // block)
        return -(-tokens // block)


def layer_specs(model: Model, *, kv_dtype: str, compute_dtype: str) -> dict[Spec, int]:
    """How many layers declare each spec, the first to stand in the model first.

    Encoders declare none, and neither does a layer that reads another's cache. ConfigError for
    what vLLM 0.19 does not serve.
    """
    specs: dict[Spec, int] = {}
    for layer, count in model.layer_kinds().items() if model.is_decoder else ():
        for spec in specs_of_layer(model, layer, kv_dtype, compute_dtype):
            specs[spec] = specs.get(spec, 0) + count
    if model.text_type in ("qwen2", "qwen3") and len(specs) > 1:
        raise _refusal(model, "windows on some layers alone")  # an assert of Qwen2Model
    return specs


def specs_of_layer(model: Model, layer: Layer, kv_dtype: str, compute_dtype: str) -> Iterator[Spec]:
    """What one block declares."""
    for mixer in (layer.attention, layer.beside):
        match mixer:
            case None | GQA(shares_cache=True):
                pass
            case GQA():
                yield _attention(mixer, kv_dtype)
            case MLA():
                yield from _latent(model, mixer, kv_dtype)
            case SharedAttention(num_key_value_heads=G, head_dim=D) if model.text_type == "zamba2":
                size = 2 * G * D * element_bytes(kv_dtype)
                yield Spec(kind="full attention", keeps="all", token_bytes=size)
            case Mixer():
                state = state_bytes(model, mixer, compute_dtype)
                if state is None:
                    raise _refusal(model, f"{mixer.kind} layers")
                yield Spec(kind=mixer.kind, keeps="state", state_bytes=state)
    if layer.cross_attention is not None:
        if model.text_type != "whisper":
            raise _refusal(model, "cross-attention")
        size = attention_cache_elements(layer.cross_attention, tokens=1) * element_bytes(kv_dtype)
        yield Spec(kind="cross-attention", keeps="encoder", token_bytes=size)


def _attention(attention: GQA, kv_dtype: str) -> Spec:
    """FullAttentionSpec, SlidingWindowSpec or ChunkedLocalAttentionSpec."""
    size = attention_cache_elements(attention, tokens=1) * element_bytes(kv_dtype)
    window = attention.sliding_window
    if window is None:
        return Spec(kind=mixer_kind(attention), keeps="all", token_bytes=size)
    if attention.chunked:
        return Spec(kind=f"chunks of {window}", keeps="chunk", token_bytes=size, span=window)
    return Spec(kind=mixer_kind(attention), keeps="window", token_bytes=size, span=window)


def _latent(model: Model, attention: MLA, kv_dtype: str) -> Iterator[Spec]:
    """MLAAttentionSpec: one vector for each token, whole on every GPU.

    Beside a sparse layer's, the indexer's keys: fp8 with a float32 scale for every 128, whatever
    the KV dtype (DeepseekV32IndexerCache, models/deepseek_v2.py).
    """
    if model.text_type not in LATENT_TYPES:
        raise _refusal(model, "latents")
    d_c, d_rope, indexer = (
        attention.kv_lora_rank,
        attention.qk_rope_head_dim,
        attention.indexer,
    )
    sparse = model.text_type in SPARSE_TYPES
    if attention.shares_cache or sparse != (indexer is not None):
        raise _refusal(model, "latents or picks shared between layers")
    size = (d_c + d_rope) * element_bytes(kv_dtype)
    if indexer is None:
        yield Spec(kind=mixer_kind(attention), keeps="all", token_bytes=size, latent=True)
        return
    if (d_c, d_rope) != SPARSE_LATENT or kv_dtype not in ("bf16", "fp8"):
        raise ConfigError(
            f"kv_lora_rank={d_c}, qk_rope_head_dim={d_rope}, kv_dtype={kv_dtype!r} is not what "
            "vLLM 0.19 has a sparse kernel for: 512, 64 and bf16 or fp8"
        )
    if kv_dtype == "fp8":
        size = FP8_DS_MLA_BYTES
    yield Spec(kind="sparse latent (MLA)", keeps="all", token_bytes=size, latent=True)
    D = indexer.index_head_dim
    keys = D + D // INDEXER_SCALE_ELEMENTS * 4
    yield Spec(kind="indexer keys", keeps="all", token_bytes=keys, latent=True)


def _refusal(model: Model, part: str) -> ConfigError:
    return ConfigError(
        f"runtime=vllm does not serve {part} of model_type={model.model_type} (0.19): "
        "runtime=transformers has their cache"
    )
