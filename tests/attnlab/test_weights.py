from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file

from attnlab.transformer import Transformer
from attnlab.weights import load_safetensors, load_state_dict
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
    state["lm_head.weight"] = torch.ones(60, 32)
    with pytest.raises(ConfigError, match=r"lm_head\.weight \[60, 32\] instead of \[97, 32\]"):
        load_state_dict(transformer, state)
    assert torch.equal(transformer.embed_tokens.weight, before)


APART = ["mixtral", "qwen3_moe", "phimoe", "ernie4_5_moe", "glm4_moe", "minimax_m2", "deepseek_v2"]
"""Families whose files keep the tensors of each expert apart."""
FILES = ["llama", "gpt2", "falcon-40b", "bloom", "gpt_bigcode, all heads", "opt-350m"]
FILES += [*APART, "granitemoe", "gpt_oss", "dbrx", "olmoe", "qwen2_moe"]


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("shards", ["5MB", "20KB"])
@pytest.mark.parametrize("family", FILES)
def test_files_that_transformers_wrote_are_loaded(pairs, family, shards, tmp_path):
    theirs, ours = pairs(family)
    theirs.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "20KB")
    loaded = Transformer(ours.model, dtype=torch.float32, device="cpu")
    load_safetensors(loaded, tmp_path)
    assert same(loaded, ours)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gptj, tied"])
def test_files_of_the_model_without_its_head_are_loaded(pairs, family, tmp_path):
    """As gpt2 and bloom lie on the Hub: `h.0.…`, not `transformer.h.0.…`."""
    theirs, ours = pairs(family)
    state = {name.removeprefix("transformer."): t for name, t in theirs.state_dict().items()}
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors")
    loaded = Transformer(ours.model, dtype=torch.float32, device="cpu")
    load_safetensors(loaded, tmp_path / "model.safetensors")
    assert same(loaded, ours)


def test_weights_are_converted_to_the_dtype_of_the_transformer(pairs, tmp_path):
    theirs, ours = pairs("llama")
    theirs.save_pretrained(tmp_path)
    loaded = Transformer(ours.model, dtype=torch.bfloat16, device="cpu")
    load_safetensors(loaded, tmp_path)
    assert same(loaded, ours.__class__.to(deepcopy(ours), torch.bfloat16))


def test_files_that_are_not_whole_are_rejected(pairs, tmp_path):
    theirs, ours = pairs("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    sorted(tmp_path.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ConfigError, match="shard"):
        load_safetensors(ours, tmp_path)


def test_quantised_weights_are_rejected(pairs, tmp_path):
    theirs, ours = pairs("llama")
    state = {name: t.to(torch.float8_e4m3fn) for name, t in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"in F8_E4M3.*: F64, F32, F16, BF16 are loaded"):
        load_safetensors(ours, tmp_path)


@pytest.mark.parametrize("family", APART)
def test_an_expert_that_the_files_lack_is_named(pairs, family, tmp_path):
    theirs, ours = pairs(family)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in reversed(state) if ".experts.3." in name)
    del state[lost]
    with pytest.raises(ConfigError, match=r"lacks experts of: model\.layers\.1\.mlp\.experts\."):
        load_state_dict(ours, state)
