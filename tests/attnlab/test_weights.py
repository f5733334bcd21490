import pytest
import torch

from attnlab.transformer import Transformer
from attnlab.weights import load_state_dict
from planner import ConfigError


@pytest.fixture
def fresh(llama_pair):
    theirs, ours = llama_pair
    return Transformer(ours.model, dtype=torch.float32, device="cpu"), theirs.state_dict()


def test_buffers_of_old_checkpoints_are_passed_over(pairs):
    theirs, ours = pairs("gpt2")
    state = theirs.state_dict() | {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64)}
    load_state_dict(Transformer(ours.model, dtype=torch.bfloat16, device="cpu"), state)


def test_square_weights_stored_in_out_are_turned(pairs):
    theirs, ours = pairs("gpt2")
    stored = theirs.state_dict()["transformer.h.1.attn.c_proj.weight"]
    assert stored.shape == (32, 32)
    assert torch.equal(ours.layers[1].self_attn.o_proj.weight, stored.T)


def test_a_missing_tensor_is_rejected(fresh):
    transformer, state = fresh
    del state["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ConfigError, match=r"lacks: model\.layers\.1\.mlp\.up_proj\.weight$"):
        load_state_dict(transformer, state)


def test_an_extra_tensor_is_rejected(fresh):
    transformer, state = fresh
    with pytest.raises(ConfigError, match=r"has besides the model's tensors: q_norm\.weight$"):
        load_state_dict(transformer, state | {"q_norm.weight": torch.ones(1)})


def test_another_shape_is_rejected_before_anything_is_copied(fresh):
    transformer, state = fresh
    before = transformer.embed_tokens.weight.clone()
    state["lm_head.weight"] = torch.ones(96, 32)
    with pytest.raises(ConfigError, match=r"lm_head\.weight \[96, 32\] instead of \[97, 32\]"):
        load_state_dict(transformer, state)
    assert torch.equal(transformer.embed_tokens.weight, before)
