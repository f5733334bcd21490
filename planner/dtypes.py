"""Element sizes of the dtypes that tensors are stored in."""

from __future__ import annotations

from typing import Any

from planner.errors import ConfigError, shown

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
"""Bytes of one element. Scales of the 8-bit types are separate tensors, counted apart."""

COMPUTE_DTYPES = ("fp32", "bf16", "fp16")
"""What a model's weights and activations can be kept in without quantisation."""

KV_DTYPES = (*ELEMENT_BYTES, "int4", "int3", "int2", "int1")
"""What some runtime keeps keys and values in; how, in `planner.kv_formats`."""

_ALIASES = {
    "float32": "fp32",
    "float": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
}


def element_bytes(dtype: str) -> int:
    """Bytes of one element of `dtype`; ConfigError for a dtype without a whole-byte size."""
    try:
        return ELEMENT_BYTES[dtype]
    except KeyError:
        allowed = ", ".join(ELEMENT_BYTES)
        raise ConfigError(f"dtype={shown(dtype)} is not known: one of {allowed}") from None


def from_torch_name(name: Any, *, field: str) -> str:
    """`"bfloat16"` or `"torch.bfloat16"`, as config.json writes it, to our name."""
    short = name.removeprefix("torch.") if isinstance(name, str) else name
    if short in COMPUTE_DTYPES:
        return str(short)
    if not isinstance(short, str) or short not in _ALIASES:
        allowed = "float32, bfloat16, float16"
        raise ConfigError(f"{field}={shown(name)} is not a dtype we know: one of {allowed}")
    return _ALIASES[short]
