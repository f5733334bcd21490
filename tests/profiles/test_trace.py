"""The traced path against the planner's own readers and against real runs on the CPU."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import planner
from planner import ConfigError, Deployment, Inference
from profiles.meters import LiveTensorMeter
from profiles.trace import trace
from profiles.traced_estimate import traced_estimate
from tests.planner.configs import BASE, TINY

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 24, "vocab_size": 30}
UNREAD = {
    "xglm": {"num_layers": 2, "d_model": 32, "ffn_dim": 8, "attention_heads": 4, "vocab_size": 30},
    "arcee": {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2},
    "exaone_moe": {
        **SMALL,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "sliding_window": 8,
        "n_group": 1,
        "topk_group": 1,
    },
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral sliding", "deepseek_v3", "mixtral"])
def test_the_traced_path_agrees_with_the_readers(name):
    model, traced = planner.read_config(TINY[name]), trace(TINY[name])
    assert traced.parameter_count == model.parameter_count
    assert dict(traced.shapes) == {p.name: p.shape for p in model.checkpoint_parameters()}
    for tokens in (5, 40):
        expected = planner.kv_cache_bytes(model, batch=2, context_tokens=tokens, dtype="bf16")
        assert traced.kv_cache_bytes(batch=2, context_tokens=tokens) == expected


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("model_type", UNREAD)
def test_the_traced_peak_is_that_of_a_real_run(model_type, dtype):
    config = UNREAD[model_type]
    live = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **config),
        dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype],
    ).eval()
    with torch.no_grad(), LiveTensorMeter() as meter:
        made = live(torch.zeros(2, 20, dtype=torch.long), use_cache=True)
        peak = meter.peak_bytes
        for _ in range(3):
            cache, made = made.past_key_values, None
            meter.reset_peak()
            made = live(torch.zeros(2, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
            peak = max(peak, meter.peak_bytes)
    traced = trace({"model_type": model_type, **config})
    ids_bytes = 3 * 8 * 2  # the steps' inputs were made inside the meter
    assert (
        0
        <= peak - traced.peak_bytes(batch=2, prompt_tokens=20, output_tokens=4, dtype=dtype)
        <= 20 * 8 * 2 + ids_bytes
    )
    held = sum(t.numel() * t.element_size() for t in (*live.parameters(), *live.buffers()))
    assert traced.weights_bytes(dtype) == held


@pytest.mark.parametrize(
    ("config", "class_name"),
    [
        ({"model_type": "xglm", "num_layers": 2, "d_model": 32, "ffn_dim": 8}, "XGLMForCausalLM"),
        ({"model_type": "bert", "num_hidden_layers": 2}, "BertModel"),
        ({"model_type": "vit", "num_hidden_layers": 1}, "ViTModel"),
        (
            {"model_type": "bert", "num_hidden_layers": 1, "architectures": ["BertForMaskedLM"]},
            "BertForMaskedLM",
        ),
        ({"model_type": "bart", "encoder_layers": 1, "decoder_layers": 1}, "BartForCondition"),
    ],
)
def test_types_without_a_reader_are_built_by_transformers(config, class_name):
    traced = trace(config)
    assert traced.class_name.startswith(class_name)
    assert traced.parameter_table()["count"].sum() == traced.parameter_count


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "bert", "num_hidden_layers": 2},
        {"model_type": "vit", "num_hidden_layers": 1, "hidden_size": 24, "image_size": 32},
    ],
)
def test_encoders_have_a_peak_and_no_cache(config):
    traced = trace(config)
    assert traced.kv_cache_bytes(batch=2, context_tokens=9) == 0
    assert traced.peak_bytes(batch=2, prompt_tokens=9) > 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no_such_type"}, "model_type='no_such_type' is not known"),
        ({}, "model_type=None is not known"),
        ({"model_type": "llama", "hidden_size": "x"}, "model_type=llama cannot be built"),
        ({**TINY["llama"], "architectures": ["Other"]}, r"architectures\[0\]='Other'"),
        ({**TINY["llama"], "architectures": ["BertModel"]}, r"architectures\[0\]='BertModel'"),
        ({**TINY["llama"], "torch_dtype": "int3"}, "dtype="),
    ],
)
def test_what_cannot_be_traced_is_one_line(config, message):
    with pytest.raises(ConfigError, match=message) as caught:
        trace(config)
    assert "\n" not in str(caught.value)


def test_a_class_that_fails_on_plain_tokens_says_so_in_one_line():
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "dim_ff": 8, "vocab_size": 40}
    traced = trace({"model_type": "cpmant", **sizes, "num_attention_heads": 2, "dim_head": 4})
    with pytest.raises(ConfigError, match="a forward of cpmant") as caught:
        traced.peak_bytes(batch=1, prompt_tokens=4, output_tokens=3)
    assert "\n" not in str(caught.value)


WORK = Inference(batch=2, prompt_tokens=40, output_tokens=4)


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3"])
def test_traced_and_predicted_estimates_agree_to_the_byte(name, logits):
    config = {**BASE, **TINY[name], "torch_dtype": "bfloat16"}
    work = Inference(batch=2, prompt_tokens=40, output_tokens=4, logits=logits)
    deploy = Deployment(gpu="cpu")
    predicted = planner.estimate(planner.read_config(config), work, deploy).memory
    traced = traced_estimate(trace(config), work, deploy).memory
    assert traced.weights_bytes == predicted.weights_bytes
    assert traced.kv_cache_bytes == predicted.kv_cache_bytes
    assert traced.peak_live_bytes == predicted.peak_live_bytes


def test_a_traced_estimate_says_that_it_is_one(tmp_path):
    result = traced_estimate(trace(TINY["llama"], name="=tiny"), WORK, Deployment(gpu="h200"))
    assert result.to_dict()["basis"] == "traced"
    assert result.to_dict()["latency"] is None
    assert "traced from LlamaForCausalLM of transformers 5.23.0" in result.explain()
    assert result.fits
    assert result.table()["bytes"].sum() == result.memory.total_bytes
    result.to_csv(tmp_path / "traced.csv")
    assert "traced from LlamaForCausalLM" in (tmp_path / "traced.csv").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtime": "vllm"}, "runtime='vllm' is not traced"),
        ({"kv_dtype": "int8"}, "kv_dtype='int8' is not traced"),
        ({"attention": "eager"}, "attention='eager' is not traced"),
    ],
)
def test_settings_beyond_the_trace_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        traced_estimate(trace(TINY["llama"]), WORK, Deployment(gpu="cpu", **change))
