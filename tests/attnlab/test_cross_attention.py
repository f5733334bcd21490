"""Cross-attention alone: against torch's own, over the cache that holds what was encoded."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attnlab.cross_attention import CrossAttention, Encoded, mask_of, real_places
from planner.layers import GQA
from tests.attnlab.encoder_decoders import pair_of
from tests.attnlab.test_caches import cache_of

GROUPED = GQA(
    num_attention_heads=6, num_key_value_heads=2, head_dim=5, scaling=0.3, qkv_bias=True,
    o_bias=True, unbiased="k",
)  # fmt: skip


@pytest.mark.parametrize("attention", ["naive", "sdpa"])
@pytest.mark.parametrize("tokens", [None, [7, 3]])
def test_grouped_queries_see_the_real_tokens_alone(attention, tokens):
    torch.manual_seed(0)
    cross = CrossAttention(GROUPED, 16, torch.float32, attention=attention).requires_grad_(False)
    for p in cross.parameters():
        p.normal_()
    x, states = torch.randn(2, 4, 16), torch.randn(2, 7, 16)
    real = real_places(tokens, batch=2, S=7, device=x.device)
    made = cross(x, Encoded(states, mask_of(real, 4, 7, x.device)), None, 0)
    for b, n in enumerate(tokens or [7, 7]):
        q = cross.q_proj(x[b]).view(4, 6, 5).transpose(0, 1)
        k, v = (p(states[b, :n]).view(n, 2, 5) for p in (cross.k_proj, cross.v_proj))
        k, v = (y.transpose(0, 1).repeat_interleave(3, dim=0) for y in (k, v))
        out = scaled_dot_product_attention(q, k, v, scale=0.3).transpose(0, 1).flatten(1)
        torch.testing.assert_close(made[b], cross.o_proj(out), rtol=1e-4, atol=1e-4)


def test_the_cache_keeps_the_encoder_in_its_own_dtype_and_without_gradient():
    ours = pair_of("bart")[1]
    cache = cache_of("growing", ours.model, dtype=torch.bfloat16)
    states = torch.randn(2, 9, 32, requires_grad=True)
    ours(torch.zeros(2, 3, dtype=torch.long), encoder_states=states, cache=cache)
    k, v = cache.cross[1]
    assert k.shape == v.shape == (2, 2, 9, 16)
    assert k.dtype == torch.bfloat16
    assert not k.requires_grad
    again = cache_of("fixed shapes", ours.model, dtype=torch.bfloat16)
    static = cache_of("static", ours.model, dtype=torch.bfloat16)
    ids = torch.arange(6).view(2, 3)
    ours(ids, encoder_states=states.detach(), encoder_tokens=[9, 2], cache=static)
    again.take(static)
    torch.testing.assert_close(ours(ids[:, :1], cache=again), ours(ids[:, :1], cache=static))
