import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import planner
from attnlab.kv_cache import KVCache
from attnlab.transformer import Transformer
from planner import ConfigError
from planner.runtimes import runtime_named

CLOSE = dict(rtol=1e-5, atol=1e-5)  # float32; logits reach 3 to 5


def cache_of(ours, *, batch=2, tokens=16, dtype=torch.float32):
    return KVCache(ours.model, batch=batch, capacity_tokens=tokens, dtype=dtype, device="cpu")


def with_attention(ours, attention):
    other = Transformer(ours.model, attention=attention, dtype=torch.float32, device="cpu")
    other.load_state_dict(ours.state_dict())
    return other.requires_grad_(False)


def test_last_logits_are_the_last_of_all(pair, ids):
    _, ours = pair
    torch.testing.assert_close(ours(ids, logits="last"), ours(ids)[:, -1:], **CLOSE)


def test_buffers_are_in_float32_and_those_that_the_planner_counts(pair):
    _, ours = pair
    model = ours.model
    expected = ["rotary"] if isinstance(model.positions, planner.layers.RoPE) else []
    expected += ["rotary_local"] if model.local_positions is not None else []
    buffers = dict(ours.named_buffers())
    assert [name for name in buffers if "inv_freq" in name] == [
        f"{name}.inv_freq" for name in expected
    ]
    assert {b.dtype for b in buffers.values()} <= {torch.float32}
    assert not any("inv_freq" in name for name in ours.state_dict())
    rows = runtime_named("attnlab").buffer_rows(model, dtype="bf16")
    assert sum(b.nbytes for b in buffers.values()) == sum(row.size_bytes for row in rows)


def test_a_cache_in_bfloat16_is_near_one_in_float32(llama_pair, ids):
    _, ours = llama_pair
    cache = cache_of(ours, dtype=torch.bfloat16)
    out = torch.cat([ours(part, cache=cache) for part in ids.split(7, dim=1)], dim=1)
    torch.testing.assert_close(out, ours(ids), rtol=0, atol=0.1)
    assert not torch.equal(out, ours(ids))


def test_no_token_sees_the_future(pair, ids):
    _, ours = pair
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 97
    before, after = ours(ids), ours(other)
    torch.testing.assert_close(after[:, :8], before[:, :8], rtol=1e-6, atol=2e-6)
    assert (after[:, 8:] - before[:, 8:]).abs().amax() > 0.1


def test_no_token_sees_beyond_the_windows_of_all_layers(pairs, ids):
    _, ours = pairs("mistral")  # two layers of 5: the last token sees 1 + 2·4 tokens
    other = ids.clone()
    other[:, :4] = (other[:, :4] + 1) % 97
    assert torch.equal(ours(other)[:, -1], ours(ids)[:, -1])
    other[:, 4] = (other[:, 4] + 1) % 97
    assert not torch.equal(ours(other)[:, -1], ours(ids)[:, -1])


def test_gradients_reach_every_parameter(pair, ids):
    _, ours = pair
    twin = with_attention(ours, None).requires_grad_(True)
    twin(ids).square().mean().backward()
    for name, p in twin.named_parameters():
        chooses = name.endswith("e_score_correction_bias")  # for the choice alone, not the weights
        assert p.grad is None if chooses else p.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_weights_give_finite_logits_in_the_dtype(pair, ids, dtype):
    _, ours = pair
    fresh = Transformer(ours.model, dtype=dtype, device="cpu")
    logits = fresh.requires_grad_(False)(ids)
    assert {p.dtype for p in fresh.parameters()} == {dtype} == {logits.dtype}
    assert logits.isfinite().all()
    assert logits.float().std() > 0


def test_random_weights_are_small_and_norms_neutral(pairs):
    for family, scale in (("llama", 1.0), ("gemma2", 0.0), ("gpt2", 1.0)):
        fresh = Transformer(pairs(family)[1].model, dtype=torch.float32, device="cpu")
        p = dict(fresh.named_parameters())
        assert (p["layers.1.input_layernorm.weight"] == scale).all()
        assert p["embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.1)
        assert all((b == 0).all() for name, b in p.items() if name.endswith("bias"))


def test_a_model_runs_on_meta(llama_pair, ids):
    """Ops of the meta device are those of fake tensors, which run every family."""
    meta = Transformer(llama_pair[1].model, dtype=torch.bfloat16, device="meta")
    assert meta(ids.to("meta")).shape == (2, 13, 97)


def test_a_model_on_meta_holds_no_memory_and_runs_on_fake_tensors(pair):
    _, ours = pair
    meta = Transformer(ours.model, dtype=torch.bfloat16, device="meta")
    assert {p.device.type for p in (*meta.parameters(), *meta.buffers())} == {"meta"}
    with FakeTensorMode():
        fake = Transformer(ours.model, dtype=torch.bfloat16, device="cpu")
        assert fake(torch.zeros(2, 13, dtype=torch.long)).shape == (2, 13, 97)


def test_sdpa_with_a_soft_cap_is_rejected(pairs):
    model = pairs("gemma2")[1].model
    with pytest.raises(ConfigError, match=r"attention=sdpa has no logit_softcap=2\.0: use naive"):
        Transformer(model, attention="sdpa", dtype=torch.float32, device="meta")


def test_an_unknown_attention_is_rejected(pairs):
    with pytest.raises(ConfigError, match="attention='flash' is not allowed: one of naive, sdpa"):
        Transformer(pairs("llama")[1].model, attention="flash", dtype=torch.float32, device="meta")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "deepseek_v32", "num_hidden_layers": 1}, "does not run sparse attention"),
        ({"model_type": "rwkv", "num_hidden_layers": 1}, "does not run RWKV layers of rwkv"),
        ({"model_type": "llama", "architectures": ["LlamaModel"]}, "lm_head=False does not run"),
    ],
)
def test_what_attnlab_does_not_run_is_rejected(config, message):
    with pytest.raises(ConfigError, match=message):
        Transformer(planner.read_config(config), dtype=torch.float32, device="meta")


def test_learned_positions_end_the_prompt(pairs):
    ours = pairs("gpt2")[1]
    with pytest.raises(ConfigError, match="= 65 reaches beyond max_position_embeddings=64"):
        ours(torch.zeros(1, 65, dtype=torch.long))


def test_bad_calls_are_rejected(llama_pair, ids):
    _, ours = llama_pair
    with pytest.raises(ConfigError, match=r"ids \[13\] of torch.int64 are not allowed"):
        ours(ids[0])
    with pytest.raises(ConfigError, match=r"ids \[2, 13\] of torch.float32 are not allowed"):
        ours(ids.float())
    with pytest.raises(ConfigError, match="logits='first' is not allowed: one of all, last"):
        ours(ids, logits="first")
    cache = cache_of(ours, tokens=12)
    with pytest.raises(ConfigError, match=r"0 cached \+ 13 new tokens = 13 do not fit .*=12"):
        ours(ids, cache=cache)
    with pytest.raises(ConfigError, match="ids have batch=1, the cache has batch=2"):
        ours(ids[:1], cache=cache)
    assert cache.length == 0
