"""Oracle: FP8Linear and FP8Experts of transformers, put into the live class on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.quantizers.base import HfQuantizer

import planner
from planner import ConfigError
from tests.planner.configs import TINY
from tests.planner.huggingface import test_readers_later_decoders as later
from tests.planner.oracle import live_model
from tests.properties import examples

DTYPES = {
    "torch.float8_e4m3fn": "fp8",
    "torch.float8_e8m0fnu": "uint8",
    "torch.int8": "int8",
    "torch.float32": "fp32",
    "torch.bfloat16": "bf16",
}


CONFIGS = {**TINY, "llama4_text": later.variant("llama4_text", {"intermediate_size": 40})}


def live_bytes(name: str, settings_: dict[str, Any]) -> int:
    live, config = live_model(CONFIGS[name]), FineGrainedFP8Config(**settings_)
    skipped = HfQuantizer.get_modules_to_not_convert(live, config.modules_to_not_convert)
    torch.set_default_dtype(torch.bfloat16)  # as from_pretrained does, for the biases
    try:
        replace_with_fp8_linear(live, skipped, config, True)
    finally:
        torch.set_default_dtype(torch.float32)
    return sum(p.numel() * p.element_size() for p in live.parameters())


def ours(name: str, **settings_: Any) -> planner.Model:
    quantised = {"quant_method": "fp8", **settings_}
    return planner.read_config(
        {**CONFIGS[name], "torch_dtype": "bfloat16", "quantization_config": quantised}
    )


def our_bytes(model: planner.Model) -> int:
    return int(model.weight_table()["bytes"].sum())


@pytest.mark.parametrize(
    ("name", "settings_"),
    [
        ("llama", {}),
        ("llama with biases, tied", {}),
        ("gpt2", {}),
        ("llama", {"weight_block_size": None, "activation_scheme": "static"}),
        ("llama", {"weight_block_size": [24, 40]}),
        ("llama", {"scale_fmt": "ue8m0", "weight_block_size": [16, 16]}),
        ("llama", {"modules_to_not_convert": ["lm_head", "model.layers.1", "mlp.down_proj"]}),
        ("llama", {"modules_to_not_convert": [r"model.layers.*.self_attn"]}),
        ("deepseek_v3", {"weight_block_size": [16, 16]}),
        ("mixtral", {"weight_block_size": [16, 32]}),
        ("llama4_text", {"weight_block_size": [8, 16]}),
    ],
)
def test_bytes_are_those_of_the_replaced_modules(name, settings_):
    assert our_bytes(ours(name, **settings_)) == live_bytes(name, settings_)


@given(
    rows=st.integers(1, 200),
    columns=st.integers(1, 200),
    scheme=st.sampled_from(["dynamic", "static"]),
    fmt=st.sampled_from(["float", "ue8m0"]),
)
@examples(20)
def test_any_block_is_covered_by_its_scales(rows, columns, scheme, fmt):
    settings_ = {
        "weight_block_size": [rows, columns],
        "activation_scheme": scheme,
        "scale_fmt": fmt,
    }
    assert our_bytes(ours("llama", **settings_)) == live_bytes("llama", settings_)


def test_names_shapes_and_dtypes_are_those_of_the_module():
    live = live_model(TINY["llama"])
    replace_with_fp8_linear(live, ["lm_head"], FineGrainedFP8Config(), True)
    expected = {n: (DTYPES[str(p.dtype)], tuple(p.shape)) for n, p in live.named_parameters()}
    table = ours("llama").weight_table()
    rows = zip(table["name"], table["dtype"], table["shape"], strict=True)
    assert {name: (dtype, shape) for name, dtype, shape in rows} == expected


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"weight_block_size": [128]}, r"weight_block_size=\[128\] is not allowed: two sizes"),
        ({"weight_block_size": [0, 128]}, "weight_block_size=0 is not allowed"),
        ({"activation_scheme": "sometimes"}, "activation_scheme='sometimes' is not allowed"),
        ({"scale_fmt": 3}, "scale_fmt=3 is not allowed"),
        ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert='lm_head' is not allowed"),
        ({"modules_to_not_convert": ["("]}, r"modules_to_not_convert has '\('"),
        ({"modules_to_not_convert": ["a" * 999]}, "≤ 300 characters"),
        ({"modules_to_convert": ["embed_tokens"]}, "modules_to_convert=.* is not read yet"),
    ],
)
def test_bad_settings_are_named(settings_, message):
    with pytest.raises(ConfigError, match=message):
        ours("llama", **settings_)
