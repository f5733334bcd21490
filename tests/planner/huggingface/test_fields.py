from __future__ import annotations

import inspect
import json

import pytest
from transformers import CONFIG_MAPPING

import planner
from planner import ConfigError
from planner.huggingface import READERS
from planner.huggingface.fields import SAME_AS
from planner.runtimes.transformers import EAGER_ONLY, WINDOWED
from tests.planner.configs import TINY
from tools.huggingface_defaults import MODEL_TYPES, TARGET, all_defaults

LLAMA = TINY["llama"]


def test_the_defaults_are_those_of_the_installed_transformers():
    moved = "run tools/huggingface_defaults.py: a config class has changed"
    assert json.loads(TARGET.read_text()) == json.loads(json.dumps(all_defaults())), moved
    assert set(READERS) <= {*MODEL_TYPES, *SAME_AS}
    assert not set(SAME_AS) & set(CONFIG_MAPPING), "transformers knows them now"


@pytest.mark.parametrize("model_type", sorted(READERS))
def test_what_is_known_of_a_class_is_what_its_source_says(model_type):
    from transformers import AutoModelForCausalLM

    model_type = SAME_AS.get(model_type, model_type)
    live = AutoModelForCausalLM._model_mapping.get(CONFIG_MAPPING[model_type], None)
    if live is None:
        return  # no language model of its own: what is known is that of the type inside it
    source = inspect.getsource(inspect.getmodule(live))
    body = source.split("class ", 1)[1]  # behind the imports
    words = ("create_sliding_window_causal_mask", "create_chunked_causal_mask")
    makes_masks = any(word in body for word in words)
    assert (model_type in WINDOWED) == makes_masks
    assert (model_type in EAGER_ONLY) == (not live._supports_sdpa)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": "lama"}, "model_type='lama' has no reader .* nearest known are llama"),
        ({"model_type": 7}, "model_type=7 has no reader"),
        ({"num_attention_heads": 5, "hidden_size": 65}, "num_attention_heads=5 is not a multiple"),
        ({"hidden_size": 66}, "hidden_size=66 is not a multiple of num_attention_heads=4"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"hidden_size": "64"}, "hidden_size='64' is not allowed"),
        ({"hidden_size": -64}, "hidden_size=-64 is not allowed"),
        ({"hidden_size": 2**40}, "hidden_size=1099511627776 is not allowed"),
        ({"num_hidden_layers": 5_000}, "num_hidden_layers=5000 is not allowed"),
        ({"num_hidden_layers": None}, "num_hidden_layers is missing"),
        ({"vocab_size": 0}, "vocab_size=0 is not allowed"),
        ({"hidden_act": "swoosh"}, "hidden_act='swoosh' is not allowed"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small' is not allowed"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps=1000"),
        ({"rope_theta": 10**400}, "rope_theta=1000"),
        ({"head_dim": 15}, "head_dim=15 gives 15 rotary dimensions"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan is not allowed"),
        ({"attention_bias": "yes"}, "attention_bias='yes' is not allowed"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 is not allowed"),
        ({"layer_types": ["full_attention"]}, "layer_types="),
        ({"layer_types": ["round"] * 3}, "layer_types has 'round'"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window=None is not allowed"),
        ({"rope_parameters": 5}, "rope_parameters=5 is not allowed"),
        ({"rope_scaling": {"type": "warp"}}, "rope_type='warp' is not allowed"),
        ({"rope_theta": -1}, "rope_theta=-1 is not allowed"),
        ({"torch_dtype": "int7"}, "dtype='int7' is not a dtype we know"),
        ({"architectures": ["LlamaForTokenClassification"]}, r"architectures\[0\]="),
        ({"quantization_config": "gptq"}, "quantization_config='gptq' is not allowed"),
    ],
)
def test_bad_configs_are_refused_by_field_and_value(change, message):
    with pytest.raises(ConfigError, match=message) as caught:
        planner.read_config({**LLAMA, **change})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("deepseek_v3", {"n_group": 3}, "num_experts=8 is not a multiple of n_group=3"),
        ("deepseek_v3", {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than"),
        ("mixtral", {"num_local_experts": 1}, "num_experts_per_tok=2 is more than num_experts=1"),
        ("gpt2", {"n_head": 5}, "hidden_size=64 is not a multiple of num_attention_heads=5"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True is not read yet"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ],
)
def test_contradictions_of_other_families_are_refused(kind, change, message):
    with pytest.raises(ConfigError, match=message):
        planner.read_config({**TINY[kind], **change})


def test_a_bare_model_has_no_head():
    from transformers import AutoConfig, AutoModel

    config = {**LLAMA, "architectures": ["LlamaModel"]}
    model = planner.read_config(config)
    import torch

    with torch.device("meta"):
        live = AutoModel.from_config(AutoConfig.for_model(**LLAMA))
    assert {p.name for p in model.checkpoint_parameters()} == dict(live.named_parameters()).keys()


def test_both_spellings_of_a_field_are_read():
    by_alias = {**TINY["gpt2"]}
    by_alias["hidden_size"] = by_alias.pop("n_embd")
    assert planner.read_config(by_alias).hidden_size == 64


def test_old_and_new_rope_fields_mean_the_same():
    scaling = {"factor": 8.0, "rope_type": "linear"}
    old = planner.read_config({**LLAMA, "rope_theta": 5e5, "rope_scaling": scaling})
    new = planner.read_config({**LLAMA, "rope_parameters": {"rope_theta": 5e5, **scaling}})
    assert old.positions == new.positions
