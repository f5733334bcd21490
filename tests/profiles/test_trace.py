"""The traced path against the planner's own readers, and for types without one."""

from __future__ import annotations

import pytest

import planner
from planner import ConfigError
from profiles.trace import trace
from tests.planner.configs import TINY


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral sliding", "deepseek_v3", "mixtral"])
def test_the_traced_path_agrees_with_the_readers(name):
    model, traced = planner.read_config(TINY[name]), trace(TINY[name])
    assert traced.parameter_count == model.parameter_count
    assert dict(traced.shapes) == {p.name: p.shape for p in model.checkpoint_parameters()}
    for tokens in (5, 40):
        expected = planner.kv_cache_bytes(model, batch=2, context_tokens=tokens, dtype="bf16")
        assert traced.kv_cache_bytes(batch=2, context_tokens=tokens) == expected


@pytest.mark.parametrize(
    ("config", "class_name"),
    [
        ({"model_type": "xglm", "num_layers": 2, "d_model": 32, "ffn_dim": 8}, "XGLMForCausalLM"),
        ({"model_type": "bert", "num_hidden_layers": 2}, "BertLMHeadModel"),
        ({"model_type": "vit", "num_hidden_layers": 1}, "ViTModel"),
    ],
)
def test_types_without_a_reader_are_built_by_transformers(config, class_name):
    traced = trace(config)
    assert traced.class_name == class_name
    assert traced.parameter_table()["count"].sum() == traced.parameter_count


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no_such_type"}, "model_type='no_such_type' is not known"),
        ({}, "model_type=None is not known"),
        ({"model_type": "llama", "hidden_size": "x"}, "model_type=llama cannot be built"),
        ({**TINY["llama"], "architectures": ["Other"]}, r"architectures\[0\]='Other'"),
    ],
)
def test_what_cannot_be_traced_is_one_line(config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        trace(config)
    assert "\n" not in str(caught.value)


def test_a_class_without_a_cache_says_so():
    with pytest.raises(ConfigError, match="its cache cannot be traced"):
        trace({"model_type": "vit", "num_hidden_layers": 1}).kv_cache_bytes(
            batch=1, context_tokens=4
        )
