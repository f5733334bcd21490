"""KV formats by name: the plain ones, those of runtimes, and published ones that none of ours runs.

Names are those of whoever made them: vLLM's `--kv-cache-dtype`, llama.cpp's `--cache-type-k`.
"""

from __future__ import annotations

from planner.dtypes import COMPUTE_DTYPES
from planner.errors import ConfigError, check_choice, check_size
from planner.kv_formats import (
    KvFormat,
    Residual,
    Scales,
    StoredBytes,
    TensorFormat,
    attention_bytes,
)
from planner.layers import GQA, MLA
from planner.model import Model


def both(name: str, tensor: TensorFormat, *, slot_multiple_bytes: int = 1) -> KvFormat:
    """Keys and values stored alike."""
    return KvFormat(name=name, keys=tensor, values=tensor, slot_multiple_bytes=slot_multiple_bytes)


def _block(name: str, bits: int, *, minimum: bool = False) -> KvFormat:
    """llama.cpp's blocks of 32 elements of a row: codes, an fp16 scale, maybe an fp16 minimum."""
    scales = Scales(
        per="token-head", group_size=32, dtype="fp16", zero_dtype="fp16" if minimum else None
    )
    return both(name, TensorFormat(bits=bits, scales=scales))


def kivi(bits: int, *, group_size: int = 32, residual_tokens: int = 128) -> KvFormat:
    """KIVI (arXiv:2402.02750): keys per channel, values per token, the newest tokens unquantised.

    Keys in groups of `group_size` tokens of one channel once `residual_tokens` of them are there;
    values in groups of `group_size` channels of one token; a scale and a minimum for each group in
    the dtype of the computation; codes in words of 32 bits (github.com/jy-yuan/KIVI,
    models/llama_kivi.py).
    """
    if residual_tokens % group_size:
        raise ConfigError(
            f"residual_tokens={residual_tokens} is not a multiple of group_size={group_size}"
        )

    def tensor(per: str, rule: str) -> TensorFormat:
        return TensorFormat(
            bits=bits,
            scales=Scales(
                per=per,  # type: ignore[arg-type]
                group_size=group_size,
                dtype=None,
                zero_dtype="scale",
            ),
            packed="group",
            word_bytes=4,
            residual=Residual(tokens=residual_tokens, rule=rule),  # type: ignore[arg-type]
        )

    return KvFormat(
        name=f"kivi-{bits}",
        keys=tensor("channel", "remainder"),
        values=tensor("token-head", "window"),
    )


def turboquant(name: str, *, key_bits: int, value_bits: int) -> KvFormat:
    """TurboQuant (arXiv:2504.19874) as vLLM packs it: a slot for each token and head, even bytes.

    Keys: codes of a codebook and an fp16 norm (8 bits: fp8, no norm); values: uniform codes, an
    fp16 scale and an fp16 zero (vllm/model_executor/layers/quantization/turboquant/config.py).
    """
    norm = None if key_bits == 8 else Scales(per="token-head", dtype="fp16")
    return KvFormat(
        name=name,
        keys=TensorFormat(bits=key_bits, scales=norm, floating=key_bits == 8),
        values=TensorFormat(
            bits=value_bits, scales=Scales(per="token-head", dtype="fp16", zero_dtype="fp16")
        ),
        slot_multiple_bytes=2,
    )


_PER_TENSOR, _PER_HEAD = Scales(per="tensor"), Scales(per="head")
_PER_TOKEN_HEAD = Scales(per="token-head")

KV_FORMATS: dict[str, KvFormat] = {
    form.name: form
    for form in (
        both("fp32", TensorFormat(bits=32, floating=True)),
        both("bf16", TensorFormat(bits=16, floating=True)),
        both("fp16", TensorFormat(bits=16, floating=True)),
        both("fp8", TensorFormat(bits=8, scales=_PER_TENSOR, floating=True)),
        both("fp8_per_head", TensorFormat(bits=8, scales=_PER_HEAD, floating=True)),
        both("fp8_per_token_head", TensorFormat(bits=8, scales=_PER_TOKEN_HEAD, floating=True)),
        both("int8_per_token_head", TensorFormat(bits=8, scales=_PER_TOKEN_HEAD)),
        both("int4_per_token_head", TensorFormat(bits=4, scales=_PER_TOKEN_HEAD)),
        _block("q8_0", 8),
        _block("q5_1", 5, minimum=True),
        _block("q5_0", 5),
        _block("q4_1", 4, minimum=True),
        _block("q4_0", 4),
        _block("iq4_nl", 4),
        kivi(2),
        kivi(4),
        turboquant("turboquant_k8v4", key_bits=8, value_bits=4),
        turboquant("turboquant_4bit_nc", key_bits=4, value_bits=4),
        turboquant("turboquant_k3v4_nc", key_bits=3, value_bits=4),
        turboquant("turboquant_3bit_nc", key_bits=3, value_bits=3),
    )
}
"""Name → format. Scales are float32 where nothing else is said."""


def kv_format_bytes(
    model: Model,
    *,
    format: str | KvFormat,
    batch: int,
    context_tokens: int,
    compute_dtype: str | None = None,
) -> StoredBytes:
    """What a model's keys and values take in a format, whichever runtime would run it.

    Elements, scales with zero points, residual and padding apart; their sum is `total_bytes`.
    `format`: a name of KV_FORMATS or a KvFormat of one's own. Sliding layers keep their window.
    `compute_dtype` (None: the model's) is what residuals and some scales are kept in. What a
    runtime holds, its blocks, capacities and clipping included, is `kv_cache_bytes`.

    Raises ConfigError for an unknown format and for what keeps more than keys and values: recurrent
    states, an indexer, an encoder's.
    """
    check_size("batch", batch)
    check_size("context_tokens", context_tokens, minimum=0)
    if not isinstance(format, KvFormat):
        format = KV_FORMATS[check_choice("format", format, KV_FORMATS)]
    computed = check_choice("compute_dtype", compute_dtype or model.dtype, COMPUTE_DTYPES)
    total = StoredBytes()
    for layer, count in model.layer_kinds().items() if model.is_decoder else ():
        attention, tokens = layer.attention, context_tokens
        match attention:
            case GQA(shares_cache=True) | None:
                continue
            case GQA(sliding_window=window):
                tokens = tokens if window is None else min(tokens, window)
            case MLA(indexer=None, shares_cache=False):
                pass
            case _:
                attention = None
        if attention is None or layer.beside or layer.cross_attention:
            raise ConfigError(
                f"format={format.name!r} is of keys and values, {model.model_type} keeps more"
            )
        one = attention_bytes(format, attention, batch=batch, tokens=tokens, computed=computed)
        total += one * count
    return total
