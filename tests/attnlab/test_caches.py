"""Every cache in float32: logits of any chunking equal those of one pass without a cache."""

import pytest
import torch

import planner
from attnlab.caches import build_cache
from attnlab.growing import GrowingCache
from attnlab.kv_cache import FixedShapeCache, KVCache
from attnlab.paged import PagedCache
from attnlab.ring import RingCache
from planner import CacheSpec, ConfigError
from tests.attnlab.families import V
from tests.attnlab.test_families import twin
from tests.pairs import every_pair

CLOSE = dict(rtol=1e-4, atol=2e-5)
LENGTH = 23
KINDS = {
    "static": KVCache,
    "growing": GrowingCache,
    "ring": RingCache,
    "paged": PagedCache,
    "paged, shuffled": PagedCache,
    "fixed shapes": FixedShapeCache,
}
CHUNKS = {
    "at once": [LENGTH],
    "token by token": [1] * LENGTH,
    "chunks": [4, 5, 1, 1, 7, 2, 3],
    "chunks longer than the window": [8, 9, 6],
    "prefill and steps past several turns": [4] + [1] * (LENGTH - 4),
}
WINDOWED = ["mistral", "qwen2 sliding from layer 1", "gemma2", "gemma3", "cohere2", "olmo3"]
WINDOWED += ["mixtral, sliding", "gpt_oss", "llama4_text"]
RECURRENT = [
    "falcon_mamba",
    "mamba2",
    "nemotron_h",
    "qwen3_next",
    "kimi_linear",
    "recurrent_gemma",
    "lfm2",
]
PLAIN = [
    "qwen2_moe",
    "deepseek_v2",
    "deepseek_v3, yarn",
    "llama",
    "gpt2",
    "gpt_neo",
    "bloom",
    "falcon-40b",
    "phi",
    "opt-350m",
    "falcon-rw",
]
GROUPS = (WINDOWED, RECURRENT, PLAIN)
OTHERS = [*RECURRENT, *PLAIN]


def cache_of(kind, model, *, batch=2, tokens=LENGTH, dtype=torch.float32):
    settings = dict(batch=batch, capacity_tokens=tokens, dtype=dtype, device="cpu")
    if kind.startswith("paged"):
        settings["block_tokens"] = 5
        if "shuffled" in kind:
            settings["generator"] = torch.Generator().manual_seed(3)
    return KINDS[kind](model, **settings)


@pytest.fixture
def long_ids():
    return torch.randint(V, (2, LENGTH), generator=torch.Generator().manual_seed(4))


@every_pair(*(dict(family=group, chunks=CHUNKS, kind=KINDS) for group in GROUPS))
def test_any_chunking_over_any_cache_equals_one_pass(pairs, family, chunks, kind, long_ids):
    ours = pairs(family)[1]
    cache = cache_of(kind, ours.model)
    parts = [ours(part, cache=cache) for part in long_ids.split(CHUNKS[chunks], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), ours(long_ids), **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_naive_and_sdpa_agree_over_a_cache(pairs, kind, long_ids):
    ours = pairs("mistral")[1]
    out = []
    for attention in ("naive", "sdpa"):
        model, cache = twin(ours, attention=attention), cache_of(kind, ours.model)
        parts = [model(part, cache=cache) for part in long_ids.split(CHUNKS["chunks"], dim=1)]
        out.append(torch.cat(parts, dim=1))
    torch.testing.assert_close(*out, **CLOSE)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fixed shapes"])
@pytest.mark.parametrize("family", [*WINDOWED, *OTHERS])
def test_ragged_passes_equal_each_sequence_alone(pairs, family, kind, long_ids):
    """Passes of T tokens, of which only some are real, and none in one of them."""
    ours = pairs(family)[1]
    passes = [
        (6, [6, 2]),
        (4, [1, 4]),
        (1, [1, 1]),
        (1, [1, 1]),
        (7, [7, 0]),
        (3, [2, 3]),
        (1, [1, 1]),
    ]
    cache = cache_of(kind, ours.model)
    fed, seen = [0, 0], [[], []]
    for T, real in passes:
        ids = torch.randint(V, (2, T))  # what stands behind the real tokens must not matter
        for b, n in enumerate(real):
            ids[b, :n] = long_ids[b, fed[b] : fed[b] + n]
        out = ours(ids, cache=cache, tokens=real)
        for b, n in enumerate(real):
            seen[b].append(out[b, :n])
            fed[b] += n
    assert cache.lengths == fed
    for b in range(2):
        alone = ours(long_ids[b : b + 1, : fed[b]])
        torch.testing.assert_close(torch.cat(seen[b])[None], alone, **CLOSE)


def test_last_logits_are_those_of_each_sequences_last_real_token(llama_pair, ids):
    ours = llama_pair[1]
    last = ours(ids, logits="last", tokens=[4, 13])
    torch.testing.assert_close(last[0, 0], ours(ids[:1, :4])[0, -1], **CLOSE)
    torch.testing.assert_close(last[1, 0], ours(ids[1:])[0, -1], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_reset_forgets_and_repeats_the_logits(llama_pair, ids, kind):
    ours = llama_pair[1]
    cache = cache_of(kind, ours.model)
    first = ours(ids, cache=cache)
    cache.reset()
    torch.testing.assert_close(ours(ids, cache=cache), first, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_narrow_cache_is_near_a_wide_one(llama_pair, ids, kind, dtype):
    ours = llama_pair[1]
    cache = cache_of(kind, ours.model, dtype=dtype)
    out = torch.cat([ours(part, cache=cache) for part in ids.split(7, dim=1)], dim=1)
    torch.testing.assert_close(out, ours(ids), rtol=0, atol=0.1)
    assert not torch.equal(out, ours(ids))


@every_pair(
    *(
        dict(
            family=group,
            kind=("static", "dynamic", "ring", "paged"),
            tokens=(3, 5, 16, 23),
            dtype=("fp32", "bf16"),
        )
        for group in GROUPS
    )
)
def test_nbytes_are_those_the_planner_counts(pairs, family, kind, tokens, dtype):
    ours = pairs(family)[1]
    spec = CacheSpec(kind=kind, block_tokens=7 if kind == "paged" else None)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    cache = build_cache(ours.model, spec, batch=3, tokens=tokens, dtype=wanted, device="cpu")
    ours(torch.zeros(3, tokens, dtype=torch.long), cache=cache)
    assert cache.nbytes == planner.kv_cache_bytes(
        ours.model, batch=3, context_tokens=tokens, dtype=dtype, runtime="attnlab", cache=spec
    )
    held = [t for tensors in (*cache.layers, *cache.states) for t in tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    assert cache.nbytes == sum(storages.values())


def test_a_larger_capacity_is_counted_whole(llama_pair):
    model = llama_pair[1].model
    for kind in ("static", "ring", "paged"):
        spec = CacheSpec(kind=kind, capacity_tokens=40)
        cache = build_cache(model, spec, batch=1, tokens=9, dtype=torch.float32, device="cpu")
        settings = dict(batch=1, context_tokens=9, dtype="fp32", runtime="attnlab")
        assert cache.nbytes == planner.kv_cache_bytes(model, **settings, cache=spec)


def test_a_shuffled_pool_is_really_out_of_order(llama_pair):
    cache = cache_of("paged, shuffled", llama_pair[1].model)
    cache.begin(12, batch=2)
    blocks = cache.table[0] + cache.table[1]
    assert blocks != sorted(blocks)
    assert len(set(blocks)) == 6


def test_released_blocks_serve_the_next_sequence(llama_pair, ids):
    ours = llama_pair[1]
    cache = PagedCache(
        ours.model, batch=2, capacity_tokens=13, dtype=torch.float32, device="cpu",
        block_tokens=4, blocks=5,
    )  # fmt: skip
    ours(ids, cache=cache, tokens=[13, 2])
    assert cache.used_blocks == 5
    with pytest.raises(ConfigError, match="blocks=5 are too few: 1 more are needed, 0 free"):
        ours(ids[:, :4], cache=cache, tokens=[0, 3])
    cache.release(0)
    out = ours(ids, cache=cache, tokens=[11, 2])
    torch.testing.assert_close(out[:1, :11], ours(ids[:1, :11]), **CLOSE)


def test_a_prefix_sees_itself_in_both_directions(llama_pair, ids):
    ours = llama_pair[1]
    whole = ours(ids, prefix_tokens=5)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % V
    assert not torch.allclose(ours(changed, prefix_tokens=5)[:, 0], whole[:, 0])
    torch.testing.assert_close(
        ours(changed, prefix_tokens=4)[:, :4], ours(ids, prefix_tokens=4)[:, :4]
    )
    cache = cache_of("static", ours.model)
    parts = [ours(ids[:, :6], cache=cache, prefix_tokens=5), ours(ids[:, 6:], cache=cache)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, **CLOSE)


def test_bad_passes_are_refused_and_change_nothing(llama_pair, ids):
    ours = llama_pair[1]
    cache = cache_of("static", ours.model, tokens=12)
    with pytest.raises(ConfigError, match=r"0 cached \+ 13 new tokens = 13 do not fit .*=12"):
        ours(ids, cache=cache)
    with pytest.raises(ConfigError, match="ids have batch=1, the cache has batch=2"):
        ours(ids[:1], cache=cache)
    for tokens in ([3], [3, 14], [-1, 2], [0, 0]):
        with pytest.raises(
            ConfigError, match=r"tokens=\[.*\] are not allowed: for each of batch=2"
        ):
            ours(ids, cache=cache, tokens=tokens)
    assert cache.lengths == [0, 0]
    with pytest.raises(ConfigError, match=r"dtype=torch\.int8 is not allowed for a cache"):
        cache_of("static", ours.model, dtype=torch.int8)
    with pytest.raises(ConfigError, match="tokens are not allowed with fixed shapes"):
        ours(ids, cache=cache_of("fixed shapes", ours.model), tokens=[3, 4])
