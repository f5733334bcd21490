"""Oracle: the tensors of the real caches after a real forward on the meta device."""

from __future__ import annotations

import pytest
import torch
from transformers import StaticCache

import planner
from planner import CacheSpec, ConfigError, kv_cache_bytes
from tests.planner.configs import TINY, build

TEN = (
    "deepseek-v3",
    "gemma-2-9b",
    "gpt2",
    "llama-2-7b",
    "llama-3.1-70b",
    "llama-3.1-8b",
    "mistral-7b-v0.1",
    "mixtral-8x7b",
    "phi-3-mini-4k",
    "qwen2.5-7b",
)


def cache_bytes(cache) -> int:
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return sum(t.numel() * t.element_size() for t in tensors)


def prefill(model, batch: int, tokens: int, **options):
    ids = torch.zeros(batch, tokens, dtype=torch.long, device=model.device)
    # data-dependent routing has no meta kernels, norms are slow there; neither has a cache
    for module in model.modules():
        if type(module).__name__.endswith(("Experts", "RMSNorm")):
            module.forward = lambda hidden, *_: hidden
    with torch.no_grad():
        return model(ids, use_cache=True, logits_to_keep=1, **options).past_key_values


@pytest.mark.parametrize("name", TEN)
def test_ten_known_models_match_the_cache_at_1k_8k_and_32k(name):
    model = planner.load_model(name)
    live = build(model.config)
    for tokens in (1_024, 8_192, 32_768):
        if tokens > model.max_position_embeddings and model.model_type == "gpt2":
            continue  # its table of positions ends
        expected = cache_bytes(prefill(live, 1, tokens))
        assert kv_cache_bytes(model, batch=1, context_tokens=tokens, dtype="bf16") == expected


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("tokens", [1, 7, 8, 15, 16, 17, 40])
def test_every_reader_matches_the_cache_around_its_window(name, tokens):
    expected = cache_bytes(prefill(build(TINY[name]), 3, tokens))
    model = planner.read_config(TINY[name])
    assert kv_cache_bytes(model, batch=3, context_tokens=tokens, dtype="bf16") == expected


@pytest.mark.parametrize("window", [1, 2])
def test_the_smallest_windows_keep_what_transformers_keeps(window):
    config = {**TINY["mistral sliding"], "sliding_window": window}
    expected = cache_bytes(prefill(build(config), 1, 9))
    model = planner.read_config(config)
    assert kv_cache_bytes(model, batch=1, context_tokens=9, dtype="bf16") == expected


def test_a_stray_sliding_window_clips_a_llama_cache():
    config = {**TINY["llama"], "sliding_window": 16}
    expected = cache_bytes(prefill(build(config), 1, 8))
    assert kv_cache_bytes(planner.read_config(config), batch=1, context_tokens=8) == expected


@pytest.mark.parametrize("name", ["llama", "mistral sliding", "gemma2", "gpt2"])
def test_static_caches_match_the_real_one(name):
    live = build(TINY[name], device="cpu")
    cache = StaticCache(config=live.config, max_cache_len=64)
    with torch.no_grad():
        live(torch.zeros(2, 9, dtype=torch.long), past_key_values=cache, use_cache=True)
    spec = CacheSpec(kind="static", capacity_tokens=64)
    model = planner.read_config(TINY[name])
    assert kv_cache_bytes(model, batch=2, context_tokens=9, cache=spec) == cache_bytes(cache)


def test_the_seed_figure_holds_to_the_byte():
    """32 layers × 32 heads × 128 in fp16: 524 288 B a token, 2 GiB at 4 096 tokens."""
    model = planner.load_model("llama-2-7b")
    assert kv_cache_bytes(model, batch=1, context_tokens=1, dtype="fp16") == 524_288
    assert kv_cache_bytes(model, batch=1, context_tokens=4_096, dtype="fp16") == 2 * 2**30
    codes, scales = 2**30, 32 * 2 * 4  # fp8: half of it, and a float32 scale for each tensor
    assert kv_cache_bytes(model, batch=1, context_tokens=4_096, dtype="fp8") == codes + scales


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8", "cache": CacheSpec(kind="dynamic")}, "'dynamic': 'quantised' does"),
        ({"dtype": "int4", "cache": CacheSpec(kind="static")}, "'static': 'quantised' does"),
        ({"dtype": "bf16", "cache": CacheSpec(kind="quantised")}, "one of fp8, int8, int4"),
        ({"dtype": "fp16", "compute_dtype": "bf16"}, "it keeps what is computed, bf16"),
        ({"dtype": "int3", "runtime": "attnlab"}, "'int3' is not kept by runtime=attnlab"),
        ({"dtype": "int4", "runtime": "vllm"}, "'int4' is not kept by runtime=vllm"),
        ({"decoded_tokens": 9}, "decoded_tokens=9 is not allowed: a whole number from 0 to 8"),
    ],
)
def test_a_dtype_that_a_cache_does_not_keep_is_refused(arguments, message):
    model = planner.load_model("llama-2-7b")
    with pytest.raises(ConfigError, match=message):
        kv_cache_bytes(model, batch=1, context_tokens=9, **arguments)


@pytest.mark.parametrize(
    ("name", "published_bytes"), [("deepseek-v3", 70_272), ("llama-3.1-70b", 327_680)]
)
def test_bytes_per_token_match_published(name, published_bytes):
    """Insights into DeepSeek-V3, arXiv:2505.09343, Table 1 (BF16; 70.272 KB). Llama-3.1-70B has the
    80 layers and 8 kv heads of the table's Qwen-2.5 72B (327.680 KB)."""
    model = planner.load_model(name)
    assert kv_cache_bytes(model, batch=1, context_tokens=1, dtype="bf16") == published_bytes


def test_vllm_rounds_up_to_blocks():
    model = planner.load_model("llama-3.1-8b")
    one = kv_cache_bytes(model, batch=1, context_tokens=1, runtime="vllm")
    assert one == kv_cache_bytes(model, batch=1, context_tokens=16, runtime="vllm")
    assert one == 16 * 131_072  # 2 · 32 layers · 8 heads · 128 · 2 B, a block of 16


def test_vllm_frees_blocks_before_a_uniform_window():
    """A simulation of remove-then-allocate, block by block, as in vLLM 0.19's cache manager."""
    model = planner.load_model("mistral-7b-v0.1")
    window, block, held = 4096, 16, set()
    for step in range(9_000):
        skipped = max(0, step - window + 1) // block
        held = {i for i in held if i >= skipped}
        held |= set(range(step // block, step // block + 1))
        if step + 1 in (1, 4096, 4097, 4111, 4112, 4113, 9_000):
            expected = len(held) * block * 131_072
            got = kv_cache_bytes(model, batch=1, context_tokens=step + 1, runtime="vllm")
            assert got == expected, step + 1


def test_vllm_charges_hybrids_by_groups():
    """gemma-2: two groups of 21 layers, sliding blocks freed behind 4 096 tokens."""
    model = planner.load_model("gemma-2-9b")
    page = 2 * 16 * 8 * 256 * 2
    blocks = 8_000 // 16
    held = blocks - (8_000 - 4_096) // 16
    got = kv_cache_bytes(model, batch=1, context_tokens=8_000, runtime="vllm")
    assert got == 21 * page * (blocks + held)


def test_attnlab_allocates_the_whole_capacity():
    model = planner.load_model("mistral-7b-v0.1")
    assert kv_cache_bytes(model, batch=2, context_tokens=9_000, runtime="attnlab") == (
        2 * 9_000 * 131_072
    )


def test_a_kind_that_the_runtime_lacks_is_refused():
    model = planner.load_model("llama-3.1-8b")
    with pytest.raises(ConfigError, match=r"cache\.kind='paged' is not in runtime=transformers"):
        kv_cache_bytes(model, batch=1, context_tokens=1, cache=CacheSpec(kind="paged"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": -1}, "batch=-1 is not allowed"),
        ({"batch": True}, "batch=True is not allowed"),
        ({"batch": 2**40}, "batch=1099511627776 is not allowed"),
        ({"context_tokens": 1.5}, r"context_tokens=1\.5 is not allowed"),
        ({"dtype": "fp12"}, "dtype='fp12' is not allowed"),
        ({"runtime": "tgi"}, "runtime='tgi' is not allowed"),
        ({"encoder_tokens": 5}, "encoder_tokens=5 is not allowed"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"batch": 1, "context_tokens": 1, **change}
    with pytest.raises(ConfigError, match=message):
        kv_cache_bytes(planner.load_model("gpt2"), **arguments)
