"""What 8- and 4-bit keys and values would do to the next token, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnlab.probes.cache import last_of, probed_prefill
from attnlab.probes.quiet import mode
from attnlab.probes.subject import Probed
from planner.checks.edges import found
from planner.findings import Finding

GROUP = 64
OUTLIER, LEAST = 8.0, 0.02


def quantised_cache(probed: Probed) -> Iterator[Finding]:
    """Round the cache of one layer at a time to int8 and int4 and take one decode step.

    Rounding is symmetric, a scale for every 64 elements of a head or the whole head. Reported where
    a layer moves the logits by over 2 % of the largest at int8, or at int4 eight times as much as
    the median layer and over 2 %. It can miss caches that it cannot open (neither .layers with keys
    and values nor tuples of them), errors that add up over many steps, and other roundings' errors.
    """
    if not probed.causal or probed.takes != "ids":
        return
    ids = probed.draw(2, probed.tokens, seed=4)
    if probed.trained_tokens is not None and probed.trained_tokens < probed.tokens:
        return
    with mode(probed.module, training=False):
        try:
            errors = by_layer(probed, ids)
        except Exception:  # a cache of another build: nothing is said
            return
    if not errors:
        return
    eight, four = ([e[bits] for e in errors] for bits in (8, 4))
    median = sorted(four)[len(four) // 2]
    worst = max(range(len(four)), key=lambda layer: four[layer])
    if eight[worst] > LEAST or (four[worst] > OUTLIER * median and four[worst] > LEAST):
        yield found(
            "quantised-cache-error",
            f"layer {worst}: the next logits move by {eight[worst]:.2g} of the largest at int8, "
            f"{four[worst]:.2g} at int4; the median layer by {median:.2g} at int4",
            where=f"cache layer {worst}",
            severity="medium" if eight[worst] > LEAST else None,
        )


def by_layer(probed: Probed, ids: Tensor) -> list[dict[int, float]]:
    """Movement of the next output by layer, at 8 and 4 bits."""

    def stepped(change: tuple[int, int] | None) -> Tensor | None:
        prefill = probed_prefill(probed, ids[:, :-1])
        if prefill is None:
            return None
        _, cache, name = prefill
        cache = copy.deepcopy(cache)
        if change is not None:
            cache = rounded_layer(cache, *change)
        with torch.no_grad():
            return last_of(probed.run(ids[:, -1:], **{name: cache}), ids[:, -1:]).double()

    plain = stepped(None)
    prefill = probed_prefill(probed, ids[:, :-1])
    if plain is None or prefill is None:
        return []
    errors = []
    for layer in range(len(layers_of(prefill[1]))):
        error = {}
        for bits in (8, 4):
            got = stepped((layer, bits))
            if got is not None:
                error[bits] = float((got - plain).abs().max() / plain.abs().max().clamp_min(1e-30))
        errors.append(error)
    return errors


def layers_of(cache: Any) -> Any:
    """The layers of a cache of transformers, or of a tuple of (keys, values)."""
    return cache.layers if hasattr(cache, "layers") else cache


def rounded_layer(cache: Any, layer: int, bits: int) -> Any:
    """The cache with one layer's keys and values rounded."""
    if hasattr(cache, "layers"):
        kept = cache.layers[layer]
        kept.keys, kept.values = rounded(kept.keys, bits), rounded(kept.values, bits)
        return cache
    return tuple(
        tuple(rounded(x, bits) if isinstance(x, Tensor) else x for x in pair)
        if i == layer
        else pair
        for i, pair in enumerate(cache)
    )


def rounded(x: Tensor, bits: int) -> Tensor:
    """x rounded to `bits` with a scale for every group of its last dimension."""
    width = x.shape[-1]
    groups = x.unflatten(-1, (-1, GROUP)) if width % GROUP == 0 else x.unsqueeze(-2)
    top = 2 ** (bits - 1) - 1
    scale = groups.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
    return ((groups / scale).round().clamp(-top - 1, top) * scale).reshape(x.shape)
