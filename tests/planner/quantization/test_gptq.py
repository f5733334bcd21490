"""Oracle: layers packed here bit by bit, and what vLLM printed for a published checkpoint."""

from __future__ import annotations

import json
from math import ceil
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from tests.planner.configs import BASE, TINY
from tests.planner.oracle import linear_weights, live_model
from tests.properties import examples

LLAMA_3_1_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "float16",
}
Tensors = dict[str, tuple[str, tuple[int, ...]]]
WIDE_EXPERTS = {**TINY["deepseek_v3"], "q_lora_rank": 32, "qk_rope_head_dim": 32}


def ours(config: dict[str, Any], **given_: Any) -> planner.Model:
    quantised = {"quant_method": "gptq", "bits": 4, **given_}
    return planner.read_config(
        {"torch_dtype": "float16", **config, "quantization_config": quantised}
    )


def packed(weights: np.ndarray, bits: int) -> np.ndarray:
    """Integers as a stream of bits down each column, in words of 32."""
    stream = (weights[:, None, :] >> np.arange(bits)[None, :, None]) & 1
    stream = stream.reshape(-1, 32, weights.shape[1]).astype(np.int64)
    return (stream << np.arange(32)[None, :, None]).sum(axis=1).astype(np.uint32).view(np.int32)


def layer(
    out: int, into: int, bits: int, group_size: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A layer with a scale and a zero point for each group that an input names."""
    rows = ceil(into / (into if group_size == -1 else group_size))
    arrays = {
        "qweight": packed(np.zeros((into, out), np.int64), bits),
        "qzeros": packed(np.zeros((out, rows), np.int64), bits).T,
        "scales": np.zeros((rows, out), np.float16),
        "g_idx": np.arange(into, dtype=np.int32) // group_size,
    }
    short = {"int32": "int32", "float16": "fp16"}
    return {name: (short[str(a.dtype)], a.shape) for name, a in arrays.items()}


def tensors(model: planner.Model) -> Tensors:
    table = model.weight_table()
    rows = zip(table["name"], table["dtype"], table["shape"], strict=True)
    return {name: (dtype, shape) for name, dtype, shape in rows}


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([-1, 8, 24, 32, 64, 128]),
    kv_heads=st.sampled_from([2, 4]),
)
@examples(20)
def test_layers_are_packed_bit_by_bit(bits, group_size, kv_heads):
    config = {**BASE, "model_type": "llama", "num_key_value_heads": kv_heads}
    found = tensors(ours(config, bits=bits, group_size=group_size))
    for module, out, into in (
        ("self_attn.k_proj", kv_heads * 16, 64),
        ("mlp.up_proj", 160, 64),
        ("mlp.down_proj", 64, 160),
    ):
        for name, expected in layer(out, into, bits, group_size).items():
            assert found[f"model.layers.1.{module}.{name}"] == expected


@pytest.mark.parametrize("name", ["llama", "llama with biases, tied", "gpt2", "mistral sliding"])
def test_all_linear_layers_of_the_blocks_are_packed(name):
    """optimum's GPTQQuantizer.convert_model: nn.Linear and Conv1D whose names the blocks begin."""
    live, found = live_model(TINY[name]), tensors(ours(TINY[name]))
    blocks = {w.removesuffix(".weight") for w in linear_weights(live) if "lm_head" not in w}
    assert {n.removesuffix(".qweight") for n in found if n.endswith(".qweight")} == blocks
    others = {n for n, _ in live.named_parameters() if n.removesuffix(".weight") not in blocks}
    endings = (".qweight", ".qzeros", ".scales", ".g_idx")
    assert {n for n in found if not n.endswith(endings)} == others


def test_conv1d_is_packed_by_its_inputs():
    found = tensors(ours(TINY["gpt2"]))
    assert found["transformer.h.0.mlp.c_fc.qweight"] == ("int32", (64 // 8, 256))
    assert found["transformer.h.0.mlp.c_fc.g_idx"] == ("int32", (64,))


def test_a_published_checkpoint_is_as_large_as_vllm_printed():
    """RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16: vLLM 0.19 printed 5.38 GiB.

    Beside the file's tensors vLLM holds a rotary table, and its kernels' sorted copies of g_idx.
    """
    table = ours(LLAMA_3_1_8B, group_size=128, desc_act=True).weight_table()
    rotary_bytes = 131072 * 128 * 2
    assert (table["bytes"].sum() + rotary_bytes) / 2**30 == pytest.approx(5.38, rel=0.003)


def test_routed_experts_are_single_layers():
    table = ours(WIDE_EXPERTS).weight_table()
    one = table[table["name"] == "model.layers.1.mlp.experts.*.gate_proj.qweight"].iloc[0]
    assert (one["shape"], one["copies"]) == ((8, 32), 8)
    assert not table["name"].str.contains("gate.qweight", regex=False).any()


def test_only_listed_modules_of_the_listed_blocks_are_packed():
    model = ours(
        TINY["llama"],
        modules_in_block_to_quantize=[["self_attn.q_proj", "self_attn.k_proj"], ["mlp.up_proj"]],
        block_name_to_quantize="model.layers",
    )
    packed_ = {n.split(".", 3)[3] for n in tensors(model) if n.endswith(".qweight")}
    assert packed_ == {
        "self_attn.q_proj.qweight",
        "self_attn.k_proj.qweight",
        "mlp.up_proj.qweight",
    }


def test_experts_may_be_listed_one_by_one():
    model = ours(WIDE_EXPERTS, modules_in_block_to_quantize=[["mlp.experts.3.up_proj"]])
    table = model.weight_table().set_index("name")
    stem = "model.layers.2.mlp.experts.*"
    assert table.loc[f"{stem}.up_proj.qweight", "copies"] == 1
    assert table.loc[f"{stem}.up_proj.weight", "copies"] == 7
    assert table.loc[f"{stem}.gate_proj.weight", ["shape", "copies"]].tolist() == [(32, 64), 8]


def test_dynamic_rules_skip_and_change_layers():
    dynamic = {
        r".*\.18\..*gate.*": {"bits": 2},
        r"+:.*\.1\.mlp\.up_proj": {"bits": 8, "group_size": 32, "desc_act": True},
        r"-:.*\.1\.mlp": {},
    }
    found = tensors(ours(TINY["llama"], dynamic=dynamic))
    assert found["model.layers.1.mlp.up_proj.weight"] == ("fp16", (160, 64))
    del dynamic[r"-:.*\.1\.mlp"]
    found = tensors(ours(TINY["llama"], dynamic=dynamic))
    assert found["model.layers.1.mlp.up_proj.qweight"] == ("int32", (16, 160))
    assert found["model.layers.1.mlp.up_proj.scales"] == ("fp16", (2, 160))
    assert found["model.layers.0.mlp.up_proj.qweight"] == ("int32", (8, 160))


def test_the_head_is_packed_where_it_is_said():
    config = {**TINY["llama"], "vocab_size": 96}
    assert "lm_head.weight" in tensors(ours(config))
    assert tensors(ours(config, lm_head=True))["lm_head.qweight"] == ("int32", (8, 96))


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"bits": 5}, "bits=5 is not allowed: one of 2, 3, 4, 8"),
        ({"bits": True}, "bits=True is not allowed"),
        ({"bits": 4.0}, "bits=4.0 is not allowed"),
        ({"group_size": 0}, "group_size=0 is not allowed"),
        ({"group_size": "128"}, "group_size='128' is not allowed"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin' is not allowed"),
        ({"pack_dtype": "int16"}, "pack_dtype='int16' is not read yet: int32"),
        ({"is_marlin_format": True}, "is_marlin_format=True is not read yet"),
        ({"lm_head": "yes"}, "lm_head='yes' is not allowed"),
        ({"block_name_to_quantize": ["model"]}, "block_name_to_quantize=.* is not allowed"),
        ({"modules_in_block_to_quantize": ["q_proj"]}, "to_quantize=.* lists of module names"),
        ({"modules_in_block_to_quantize": 3}, "to_quantize=3 is not allowed"),
        ({"dynamic": ["x"]}, "dynamic=.* is not allowed: an object of patterns"),
        ({"dynamic": {"+:(": {}}}, r"dynamic has '\('"),
        ({"dynamic": {"x": {"adapter": {}}}}, "dynamic has .* for 'x'"),
        ({"dynamic": {"x": {"bits": 7}}}, "dynamic.bits=7 is not allowed"),
    ],
)
def test_bad_settings_are_named(given_, message):
    with pytest.raises(ConfigError, match=message) as raised:
        ours(json.loads(json.dumps(TINY["llama"])), **given_)
    assert "\n" not in str(raised.value)


def test_layers_that_do_not_fill_words_are_refused():
    with pytest.raises(ConfigError, match="of 64 inputs and 150 outputs: multiples of 32"):
        ours({**TINY["llama"], "intermediate_size": 150}).weight_table()
