"""Routers and experts against the classes of transformers and against one another."""

from dataclasses import replace

import pytest
import torch
import transformers as hf
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mistral4.modeling_mistral4 import Mistral4TopkRouter
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

from attnlab.backend import experts_name
from attnlab.mixture import GROUPED_BYTES, Mixture, choose_experts
from attnlab.routers import Gate, within_best_groups
from attnlab.training import training_step
from attnlab.transformer import Transformer
from planner import ConfigError
from planner.layers import Dense, MoE
from tests.attnlab.families import FAMILIES, planner
from tests.attnlab.test_families import CLOSE, twin
from tests.attnlab.test_training import shifted

MIXTURES = [
    name
    for name, make in FAMILIES.items()
    if any(
        isinstance(layer.feed_forward, MoE)
        for layer in planner.read_config(make().to_dict()).layers
    )
]


def drawn(module, seed=0):
    """The module with random weights, biases and buffers."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        torch.nn.init.normal_(tensor, std=0.3, generator=generator)
    return module.requires_grad_(False)


@pytest.mark.parametrize("family", MIXTURES)
def test_grouped_equals_loop(pairs, family, ids):
    ours = pairs(family)[1]
    assert ours.experts == "grouped"
    torch.testing.assert_close(twin(ours, experts="loop")(ids), ours(ids), **CLOSE)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx", "llama4_text", "deepseek_v3"])
def test_gradients_of_grouped_equal_those_of_the_loop(pairs, family, ids):
    model, gradients = pairs(family)[1].model, []
    for experts in ("loop", "grouped"):
        ours = Transformer(model, experts=experts, dtype=torch.float32, device="cpu")
        ours.load_state_dict(pairs(family)[1].state_dict())
        for checkpointing in ("none", "full"):
            training_step(ours, ids, shifted(ids), checkpointing=checkpointing)
            gradients.append({name: p.grad for name, p in ours.named_parameters()})
            ours.zero_grad(set_to_none=True)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


def test_llama4_scales_what_goes_into_its_experts():
    config = hf.Llama4TextConfig(
        hidden_size=16, intermediate_size=12, num_local_experts=5, num_experts_per_tok=2
    )
    theirs = drawn(Llama4TextMoe(config))
    moe = MoE(
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12, activation="silu",
        router="sigmoid", layout="transposed", norm_topk_prob=False,
        shared=Dense(intermediate_size=12, activation="silu", gated=True),
    )  # fmt: skip
    ours = Mixture(moe, 16, torch.float32, experts="loop")
    ours.load_state_dict(
        {
            name.replace("router", "gate").replace("shared_expert.", "shared_experts."): t
            for name, t in theirs.state_dict().items()
        }
    )
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(x).flatten(0, 1), theirs(x)[0], **CLOSE)


@pytest.mark.parametrize("latent", [None, 8])
@pytest.mark.parametrize("experts", ["loop", "grouped"])
def test_experts_without_a_gate_work_on_a_latent(latent, experts):
    """nemotron_h: down(relu²(up(x))), between two projections."""
    config = hf.NemotronHConfig(
        hidden_size=16, n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=12,
        moe_shared_expert_intermediate_size=20, n_group=2, topk_group=1, moe_latent_size=latent,
        mlp_hidden_act="relu2", mlp_bias=True, norm_topk_prob=True, routed_scaling_factor=1.5,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = drawn(NemotronHMoE(config))
    moe = MoE(
        num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12, activation="relu2",
        router="sigmoid-groups", gated=False, latent_size=latent, latent_bias=True, n_group=2,
        topk_group=1, routed_scaling_factor=1.5,
        shared=Dense(intermediate_size=20, activation="relu2", gated=False, bias=True),
    )  # fmt: skip
    ours = Mixture(moe, 16, torch.float32, experts=experts)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 7, 16)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_groups_of_a_softmax_may_be_judged_by_two():
    """mistral4, whose class has no correction."""
    config = hf.Mistral4Config(
        hidden_size=16, n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2,
        norm_topk_prob=True, routed_scaling_factor=1.5,
    )  # fmt: skip
    theirs = drawn(Mistral4TopkRouter(config))
    moe = MoE(
        num_experts=12, num_experts_per_tok=3, moe_intermediate_size=1, activation="silu",
        router="softmax", n_group=4, topk_group=2, routed_scaling_factor=1.5,
    )  # fmt: skip
    ours = Gate(moe, 16, torch.float32)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(9, 16)
    weights, picks = ours(x)
    _, their_weights, their_picks = theirs(x)
    assert torch.equal(picks.sort().values, their_picks.sort().values)
    torch.testing.assert_close(weights.sort().values, their_weights.sort().values, **CLOSE)


def test_a_group_is_judged_by_its_best_or_by_its_two_best():
    choice = torch.tensor([[0.9, 0.0, 0.5, 0.6]])
    moe = MoE(
        num_experts=4, num_experts_per_tok=1, moe_intermediate_size=1, activation="silu",
        router="softmax", n_group=2, topk_group=1,
    )  # fmt: skip
    for judges, kept in ((1, [0, 1]), (2, [2, 3])):
        hidden = within_best_groups(choice, replace(moe, group_best=judges)).isinf()
        assert (~hidden[0]).nonzero().flatten().tolist() == kept


def test_a_token_does_not_feel_what_its_neighbours_are(pairs, ids):
    ours = pairs("mixtral")[1].layers[0].mlp
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(ours(x)[1:, 3:5], ours(x[1:, 3:5]), **CLOSE)


def test_what_multiplies_is_named(pairs):
    ours = pairs("mixtral")[1]
    assert experts_name(ours) == "grouped:loop"  # torch's own, on a CPU
    assert experts_name(twin(ours, experts="loop")) == "loop"
    assert experts_name(pairs("llama")[1]) is None


def test_the_implementation_is_named_and_what_it_lacks_is_refused(pairs):
    model, dense = pairs("mixtral")[1].model, pairs("llama")[1].model
    assert choose_experts(None, model, torch.float32) == "grouped"
    assert choose_experts(None, model, torch.float64) == "loop"
    assert choose_experts(None, dense, torch.float32) is None
    with pytest.raises(ConfigError, match="experts='batched' is not allowed: one of loop, grouped"):
        choose_experts("batched", model, torch.float32)
    with pytest.raises(ConfigError, match=r"experts=grouped has no torch\.float64: use loop"):
        choose_experts("grouped", model, torch.float64)
    with pytest.raises(ConfigError, match="experts=loop is not allowed: llama has no mixture"):
        choose_experts("loop", dense, torch.float32)
    odd = replace(model.layers[0].feed_forward, moe_intermediate_size=GROUPED_BYTES // 4 + 1)
    odd = replace(model, layers=(replace(model.layers[0], feed_forward=odd),))
    assert choose_experts(None, odd, torch.float32) == "loop"
    with pytest.raises(ConfigError, match=r"grouped has no width 5 in torch\.float32: use loop"):
        choose_experts("grouped", odd, torch.float32)
