"""The cache that a CacheSpec describes."""

from __future__ import annotations

import torch

from attnlab.cache import Cache
from attnlab.growing import GrowingCache
from attnlab.kivi import KiviCache
from attnlab.kv_cache import KVCache
from attnlab.paged import PagedCache
from attnlab.ring import RingCache
from planner.errors import ConfigError, check_choice
from planner.model import Model
from planner.runtimes.attnlab import CACHE_KINDS, DEFAULT_BLOCK_TOKENS
from planner.runtimes.attnlab_formats import kv_format
from planner.runtimes.quantised_cache import DEFAULT_DTYPE
from planner.workload import CacheSpec

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}


def build_cache(
    model: Model,
    spec: CacheSpec | None,
    *,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
    kv_dtype: str | None = None,
) -> Cache:
    """An empty cache for `tokens` tokens of each of `batch` sequences; None: a static one.

    `dtype`: what is computed in; `kv_dtype`: what keys and values are kept in, as a Deployment
    names it (None: the same; in a quantised cache int4). `spec.capacity_tokens` goes before
    `tokens`. Raises ConfigError for what is not here, and for an encoder.
    """
    if not model.is_decoder:
        raise ConfigError(f"model_type={model.model_type} is an encoder: it runs without a cache")
    spec = spec or CacheSpec(kind="static")
    check_choice("cache.kind", spec.kind, CACHE_KINDS)
    names = {dtype: name for name, dtype in DTYPES.items()}
    quantised = spec.kind == "quantised"
    kv_dtype = kv_dtype or (DEFAULT_DTYPE if quantised else names.get(dtype, str(dtype)))
    form = kv_format(spec, kv_dtype)
    settings = dict(batch=batch, dtype=DTYPES[kv_dtype] if form is None else dtype, device=device)
    if form is not None and quantised:
        return KiviCache(model, form=form, **settings)
    if spec.kind == "dynamic":
        return GrowingCache(model, form=form, **settings)
    settings |= dict(capacity_tokens=spec.capacity_tokens or tokens, form=form)
    if spec.kind == "paged":
        return PagedCache(model, block_tokens=spec.block_tokens or DEFAULT_BLOCK_TOKENS, **settings)
    return (RingCache if spec.kind == "ring" else KVCache)(model, **settings)
