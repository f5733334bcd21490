import pytest
import torch

from attnlab.generate import generate, steps
from attnlab.kv_cache import KVCache
from planner import ConfigError


def test_generate_equals_greedy_generate_of_transformers(llama_pair, ids):
    theirs, ours = llama_pair
    expected = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=9,
        min_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert torch.equal(generate(ours, ids, output_tokens=9), expected[:, 13:])


def test_generate_equals_repeated_full_passes(pair, ids):
    _, ours = pair
    longer = ids
    for _ in range(6):
        longer = torch.cat((longer, ours(longer)[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generate(ours, ids, output_tokens=6), longer[:, 13:])


def test_the_cache_ends_one_short_of_all_tokens(llama_pair, ids):
    _, ours = llama_pair
    cache = KVCache(ours.model, batch=2, capacity_tokens=16, dtype=torch.float32, device="cpu")
    tokens = list(steps(ours, ids, 4, cache))
    assert [t.shape for t in tokens] == [(2, 1)] * 4
    assert cache.length == 13 + 4 - 1
    cache.reset()
    assert torch.equal(generate(ours, ids, output_tokens=4, cache=cache), torch.cat(tokens, 1))


def test_bad_calls_are_rejected(llama_pair, ids):
    _, ours = llama_pair
    cache = KVCache(ours.model, batch=2, capacity_tokens=13, dtype=torch.float32, device="cpu")
    with pytest.raises(ConfigError, match="13 cached"):
        generate(ours, ids, output_tokens=2, cache=cache)
    with pytest.raises(ConfigError, match=r"ids \[13\] of torch.int64 are not allowed"):
        generate(ours, ids[0], output_tokens=2)
    with pytest.raises(ConfigError, match="output_tokens=0 is not allowed"):
        generate(ours, ids, output_tokens=0)
