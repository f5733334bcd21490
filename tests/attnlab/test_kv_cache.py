import pytest
import torch

import planner
from attnlab.kv_cache import KVCache
from planner import ConfigError


@pytest.mark.parametrize(("dtype", "itemsize"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_nbytes_is_two_times_layers_batch_heads_capacity_head_dim(pairs, dtype, itemsize):
    model = pairs("llama")[1].model
    cache = KVCache(model, batch=3, capacity_tokens=11, dtype=dtype, device="cpu")
    L, attention = len(model.layers), model.layers[0].attention
    G, D = attention.num_key_value_heads, attention.head_dim
    assert cache.nbytes == 2 * L * 3 * G * 11 * D * itemsize
    assert cache.nbytes == sum(t.untyped_storage().nbytes() for t, _ in cache.layers)


def test_append_returns_all_tokens_so_far(llama_pair):
    model = llama_pair[1].model
    cache = KVCache(model, batch=2, capacity_tokens=5, dtype=torch.float32, device="cpu")
    k, v = torch.randn(2, 2, 2, 5, 16)
    for start, end in ((0, 3), (3, 5)):
        cache.begin(end - start, batch=2)
        for index in range(2):
            keys, values = cache.append(index, k[:, :, start:end], v[:, :, start:end])
            assert torch.equal(keys, k[:, :, :end])
            assert torch.equal(values, v[:, :, :end])
            assert keys.data_ptr() == cache.layers[index][0].data_ptr()
        cache.advance()
    assert cache.length == 5


def test_reset_keeps_the_memory_and_repeats_the_logits(llama_pair, ids):
    _, ours = llama_pair
    cache = KVCache(ours.model, batch=2, capacity_tokens=13, dtype=torch.float32, device="cpu")
    first, where = ours(ids, cache=cache), cache.layers[0][0].data_ptr()
    cache.reset()
    assert cache.length == 0
    assert torch.equal(ours(ids, cache=cache), first)
    assert cache.layers[0][0].data_ptr() == where


def test_bad_caches_are_rejected(llama_pair):
    model = llama_pair[1].model
    with pytest.raises(ConfigError, match="capacity_tokens=0 is not allowed"):
        KVCache(model, batch=1, capacity_tokens=0, dtype=torch.float32, device="meta")
    rwkv = planner.read_config({"model_type": "rwkv", "num_hidden_layers": 1})
    with pytest.raises(ConfigError, match="attention=RWKV does not run in attnlab"):
        KVCache(rwkv, batch=1, capacity_tokens=1, dtype=torch.float32, device="meta")
