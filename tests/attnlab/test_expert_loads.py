import pytest
import torch

from attnlab.expert_loads import expert_loads


def test_every_token_is_counted_once_for_each_of_its_experts(pairs, ids):
    ours = pairs("qwen3_moe")[1]  # its first layer is dense
    with expert_loads(ours) as loads:
        ours(ids)
        ours(ids[:, :4])
    ours(ids)
    assert list(loads.tokens) == [1]
    assert loads.tokens[1].shape == (6,)
    assert loads.tokens[1].sum() == 3 * (ids.numel() + 2 * 4)
    assert loads.dropped == 0


def test_the_counts_are_those_of_the_router(pairs, ids):
    ours = pairs("mixtral")[1]
    with expert_loads(ours) as loads:
        ours.layers[0].mlp(x := torch.randn(1, 50, 32))
    best = torch.softmax(x[0] @ ours.layers[0].mlp.gate.weight.T, dim=-1).topk(2).indices
    expected = torch.bincount(best.flatten(), minlength=5)
    assert torch.equal(loads.tokens[0], expected)
    assert loads.imbalance[0] == pytest.approx((expected.max() / expected.double().mean()).item())


def test_a_router_that_picks_one_expert_is_as_uneven_as_can_be(pairs):
    ours = pairs("llama4_text")[1]
    gate = next(block.mlp.gate for block in ours.layers if hasattr(block.mlp, "gate"))
    with expert_loads(ours) as loads:
        gate(torch.ones(7, 32))
    assert list(loads.imbalance.values()) == [5 / 2]  # all on the same 2 of 5
    assert sum(n.sum() for n in loads.tokens.values()) == 14


def test_a_model_without_experts_has_no_loads(llama_pair, ids):
    with expert_loads(llama_pair[1]) as loads:
        llama_pair[1](ids)
    assert loads.tokens == loads.imbalance == {}
