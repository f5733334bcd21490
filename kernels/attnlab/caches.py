"""The cache that a CacheSpec describes."""

from __future__ import annotations

import torch

from attnlab.cache import Cache
from attnlab.growing import GrowingCache
from attnlab.kv_cache import KVCache
from attnlab.paged import PagedCache
from attnlab.ring import RingCache
from planner.errors import check_choice
from planner.model import Model
from planner.runtimes.attnlab import CACHE_KINDS, DEFAULT_BLOCK_TOKENS
from planner.workload import CacheSpec


def build_cache(
    model: Model,
    spec: CacheSpec | None,
    *,
    batch: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Cache:
    """An empty cache for `tokens` tokens of each of `batch` sequences; None: a static one.

    `spec.capacity_tokens` goes before `tokens`. Raises ConfigError for a kind that is not here.
    """
    spec = spec or CacheSpec(kind="static")
    check_choice("cache.kind", spec.kind, CACHE_KINDS)
    capacity = spec.capacity_tokens or tokens
    if spec.kind == "dynamic":
        return GrowingCache(model, batch=batch, dtype=dtype, device=device)
    if spec.kind == "paged":
        return PagedCache(
            model,
            batch=batch,
            capacity_tokens=capacity,
            dtype=dtype,
            device=device,
            block_tokens=spec.block_tokens or DEFAULT_BLOCK_TOKENS,
        )
    kind = RingCache if spec.kind == "ring" else KVCache
    return kind(model, batch=batch, capacity_tokens=capacity, dtype=dtype, device=device)
