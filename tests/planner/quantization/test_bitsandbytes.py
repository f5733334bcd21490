"""Oracle: tiny models whose layers bitsandbytes quantises for transformers, on the CPU."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import is_bitsandbytes_available

import planner
from planner import ConfigError
from planner.prepared import as_loaded
from planner.tensors import Parameter
from tests.planner.configs import TINY, build
from tests.planner.every_type import CASES as EVERY
from tests.planner.huggingface.test_readers_gpt_like import CASES as GPT_LIKE
from tests.planner.oracle import live_model

DTYPES = {
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
}
with_library = pytest.mark.skipif(
    not is_bitsandbytes_available(), reason="bitsandbytes quantises the oracle"
)
FOUR: dict[str, Any] = {"load_in_4bit": True}
EIGHT: dict[str, Any] = {"load_in_8bit": True}
NF4 = {**FOUR, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def live_state(name: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What save_pretrained writes, tied weights once."""
    from transformers.integrations import bitsandbytes as integration

    live, config = build(TINY[name], device="cpu"), BitsAndBytesConfig(**settings)
    weights = {n: p.detach().clone() for n, p in live.named_parameters()}
    tied = set(live.state_dict()) - set(weights)
    skipped = HfQuantizer.get_modules_to_not_convert(
        live, config.llm_int8_skip_modules, live._keep_in_fp32_modules
    )
    torch.set_default_dtype(torch.bfloat16)  # as from_pretrained does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        integration.replace_with_bnb_linear(live, skipped, config)
    torch.set_default_dtype(torch.float32)
    quantise = (
        integration.Bnb4bitQuantize if config.load_in_4bit else integration.Bnb8bitQuantize
    )(None)
    for module_name, module in live.named_modules():
        if hasattr(module, "source_cls"):
            weight = f"{module_name}.weight"
            made = quantise.convert({weight: weights[weight]}, model=live)
            module.weight = made[weight]
    return {n: t for n, t in live.state_dict().items() if n not in tied}


def ours(name: str, **settings: Any) -> planner.Model:
    quantised = {"quant_method": "bitsandbytes", **settings}
    return planner.read_config(
        {**TINY[name], "torch_dtype": "bfloat16", "quantization_config": quantised}
    )


@with_library
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", FOUR),
        ("llama", NF4),
        ("llama", {**FOUR, "bnb_4bit_quant_type": "nf4"}),
        ("llama", {**NF4, "bnb_4bit_quant_storage": "bfloat16"}),
        ("llama", {**FOUR, "bnb_4bit_quant_storage": "float32"}),
        ("llama", {**NF4, "llm_int8_skip_modules": ["lm_head", "model.layers.1", "down_proj"]}),
        ("llama", {**NF4, "llm_int8_skip_modules": []}),
        ("llama with biases, tied", NF4),
        ("gpt2", NF4),
        ("gpt2", EIGHT),
        ("mixtral", NF4),
        ("deepseek_v3", NF4),
        ("llama", EIGHT),
        ("llama with biases, tied", EIGHT),
        ("mixtral", {**EIGHT, "llm_int8_skip_modules": ["self_attn"]}),
    ],
)
def test_tensors_are_those_that_are_saved(name, settings):
    expected = live_state(name, settings)
    table = ours(name, **settings).weight_table()
    rows = zip(table["name"], table["dtype"], table["shape"], strict=True)
    found = {name: (dtype, shape) for name, dtype, shape in rows}
    assert found.keys() == expected.keys() - {"model.rotary_emb.inv_freq"}
    for tensor, (dtype, shape) in found.items():
        live = expected[tensor]
        assert dtype == DTYPES[live.dtype], tensor
        if "quant_state" in tensor and settings.get("bnb_4bit_use_double_quant"):
            assert abs(shape[0] - live.numel()) <= 14, tensor  # the digits of one number
        else:
            assert shape == tuple(live.shape), tensor


@with_library
@pytest.mark.parametrize(("out", "into"), [(3, 5), (7, 9), (13, 1), (64, 65)])
def test_sizes_that_do_not_divide_are_rounded_up(out, into):
    import bitsandbytes

    module = bitsandbytes.nn.Linear4bit(into, out, bias=False, compress_statistics=False)
    expected = {n: tuple(t.shape) for n, t in module.to("cpu").state_dict().items()}
    one = Parameter(name="x.weight", group="head", layer=None, shape=(out, into), linear=True)
    method = ours("llama", **FOUR).quantization
    assert method is not None
    found = {s.name.removeprefix("x."): s.shape for s in method.stored(one, "fp32")}
    assert found == expected


def assert_same_layers_stay(config: dict[str, Any], auto: str) -> None:
    """integrations/bitsandbytes.py, replace_with_bnb_linear: nn.Linear itself, and Conv1D."""
    live = live_model(config, auto=auto)
    loaded = planner.Deployment(gpu="h200", weight_dtype="int8", runtime="transformers")
    table = as_loaded(planner.read_config(config), loaded).weight_table()
    skipped = HfQuantizer.get_modules_to_not_convert(live, None, live._keep_in_fp32_modules)
    expected = {
        f"{name}.weight"
        for name, module in live.named_modules()
        if (isinstance(module, Conv1D) or type(module) is torch.nn.Linear)
        and should_convert_module(name, skipped)
    }
    assert set(table["name"][table["dtype"] == "int8"]) == expected


@pytest.mark.parametrize("kind", EVERY)
def test_layers_that_stay_are_those_of_transformers(kind):
    assert_same_layers_stay(EVERY[kind].config, EVERY[kind].auto)


@pytest.mark.parametrize("name", GPT_LIKE)
@pytest.mark.parametrize("tied", [True, False])
def test_so_they_are_with_the_head_tied_or_not(name, tied):
    kind, change = GPT_LIKE[name]
    assert_same_layers_stay(
        {"model_type": kind, **change, "tie_word_embeddings": tied}, auto="causal"
    )


@pytest.mark.parametrize("kind", ["olmo", "zamba2", "gemma3n_text", "gemma4", "phimoe", "whisper"])
def test_so_they_are_where_tying_changes_which_layer_is_last(kind):
    for tied in (True, False):
        assert_same_layers_stay(
            {**EVERY[kind].config, "tie_word_embeddings": tied}, EVERY[kind].auto
        )


def test_experts_of_llama4_are_apart_in_a_quantised_checkpoint_alone():
    """SequentialLlama4TextExperts stands for the fused ones where weights are quantised already."""
    config, method = EVERY["llama4_text"].config, {"quant_method": "bitsandbytes", **EIGHT}
    model = planner.read_config({**config, "quantization_config": method})
    live = live_model(config)
    quantizer = SimpleNamespace(quantization_config=BitsAndBytesConfig(**EIGHT))
    HfQuantizer._convert_model_for_quantization(quantizer, live)
    expected = {
        f"{name}.weight": tuple(module.weight.shape)
        for name, module in live.named_modules()
        if type(module) is torch.nn.Linear and name != "lm_head"
    }
    found = {
        s.name.replace("*", str(place)): s.shape
        for _, s in model.stored_tensors()
        if s.dtype == "int8"
        for place in range(s.copies)
    }
    assert found == expected
    loaded = planner.Deployment(gpu="h200", weight_dtype="int8", runtime="transformers")
    on_load = as_loaded(planner.read_config(config), loaded)
    assert {s.dtype for p, s in on_load.stored_tensors() if p.group == "experts"} == {"fp32"}


def test_bytes_of_a_published_recipe():
    """NF4 with double quantisation: 4.127 bits a weight (arXiv:2305.14314, section 3)."""
    table = planner.read_config(
        {
            **TINY["llama"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "quantization_config": {"quant_method": "bitsandbytes", **NF4},
        }
    ).weight_table()
    quantised = table[table["parameter"].str.contains("proj")]
    weights = 3 * (2 * 4096 * 4096 + 2 * 4096 * 2048 + 3 * 4096 * 14336)
    assert quantised["bytes"].sum() * 8 / weights == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "load_in_4bit=False beside load_in_8bit=False is not allowed"),
        ({**FOUR, **EIGHT}, "load_in_4bit=True beside load_in_8bit=True is not allowed"),
        ({"load_in_4bit": 1}, "load_in_4bit=1 is not allowed: true or false"),
        ({**FOUR, "bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type='nf5' is not allowed"),
        ({**FOUR, "bnb_4bit_quant_storage": "float64"}, "quant_storage='float64' is not allowed"),
        ({**FOUR, "bnb_4bit_quant_type": ["nf4"]}, r"bnb_4bit_quant_type=\['nf4'\] is not allowed"),
        ({**EIGHT, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight=True is not read"),
        ({**EIGHT, "llm_int8_skip_modules": "lm_head"}, "skip_modules='lm_head' is not allowed"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        ours("llama", **settings)
