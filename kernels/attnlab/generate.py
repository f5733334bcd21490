"""Greedy decoding: one prefill that yields the first token, then a step for each further one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attnlab.kv_cache import KVCache
from attnlab.transformer import Transformer, check_ids
from planner.errors import check_size


@torch.no_grad()
def steps(
    transformer: Transformer, prompt_ids: Tensor, output_tokens: int, cache: KVCache
) -> Iterator[Tensor]:
    """Each new token [B, 1] as its pass ends: the prefill's, then output_tokens − 1 decode steps'.

    The prompt [B, T] follows what the cache holds; afterwards that is T + output_tokens − 1 longer.
    """
    ids = prompt_ids
    for _ in range(check_size("output_tokens", output_tokens)):
        ids = transformer(ids, cache=cache, logits="last").argmax(-1)
        yield ids


def generate(
    transformer: Transformer,
    prompt_ids: Tensor,
    *,
    output_tokens: int,
    cache: KVCache | None = None,
) -> Tensor:
    """The most likely continuation [B, output_tokens] of prompts [B, T].

    Without a cache one of exactly T + output_tokens − 1 tokens is made, in the transformer's dtype.
    """
    check_size("output_tokens", output_tokens)
    B, T = check_ids(prompt_ids)
    if cache is None:
        cache = KVCache(
            transformer.model,
            batch=B,
            capacity_tokens=T + output_tokens - 1,
            dtype=transformer.dtype,
            device=transformer.device,
        )
    return torch.cat(list(steps(transformer, prompt_ids, output_tokens, cache)), dim=1)
