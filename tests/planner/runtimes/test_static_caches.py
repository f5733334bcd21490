"""Oracle: transformers' StaticCache, allocated once, of every family on the meta device."""

from __future__ import annotations

from typing import Any

import pytest

import planner
from planner import CacheSpec, kv_cache_bytes
from tests.planner.configs import TINY
from tests.planner.huggingface import test_readers_gpt_like as gpt_like
from tests.planner.huggingface import test_readers_later_decoders as later
from tests.planner.huggingface import test_readers_norms_and_mixtures as mixtures
from tests.planner.oracle import live_cache_bytes, live_model, live_prefill

CASES: dict[str, dict[str, Any]] = {
    **TINY,
    **{
        f"{kind} {i}": later.variant(kind, change)
        for i, (kind, change) in enumerate(later.VARIANTS)
    },
    **{name: mixtures.config_of(name) for name in mixtures.CONFIGS},
    **{name: {"model_type": kind, **change} for name, (kind, change) in gpt_like.CASES.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_static_caches_are_those_of_the_class(name):
    model = planner.read_config(CASES[name])
    # mpt looks at a value of its mask, which the meta device does not have
    live = live_model(CASES[name], device="cpu" if model.model_type == "mpt" else None)
    # falcon's ALiBi is as long as the prompt: its class runs in a cache of just that length
    beyond = () if name == "falcon rw" else (9, 20)
    for capacity in (5, *beyond):  # below, just above and far beyond the windows of 8 and 16
        cache = live_prefill(live, 2, 5, static=capacity)
        spec = CacheSpec(kind="static", capacity_tokens=capacity)
        got = kv_cache_bytes(model, batch=2, context_tokens=5, cache=spec)
        assert got == live_cache_bytes(cache), capacity
