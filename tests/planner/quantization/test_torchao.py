"""Oracle: quantize_ of torchao on the live class, by TorchAoConfig as config.json writes it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

import planner
from planner import ConfigError
from tests.planner.configs import TINY
from tests.planner.oracle import live_model

DTYPES = {
    "torch.float8_e4m3fn": "fp8",
    "torch.int8": "int8",
    "torch.float32": "fp32",
    "torch.bfloat16": "bf16",
}
ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
TENSOR = {"_type": "PerTensor", "_version": 1, "_data": {}}
GROUP = {"_type": "PerGroup", "_version": 1, "_data": {"group_size": 32}}
INT8, INT8_DYNAMIC = "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"
FLOAT8, FLOAT8_DYNAMIC = "Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig"
INT4 = "Int4WeightOnlyConfig"
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def config(type_: str, version: Any = 2, **data: Any) -> dict[str, Any]:
    inner = {"_type": type_, "_version": version, "_data": data}
    return {"quant_method": "torchao", "quant_type": {"default": inner}}


def ours(name: str, quantised: dict[str, Any], **others: Any) -> Tensors:
    model = planner.read_config(
        {**TINY[name], "torch_dtype": "bfloat16", "quantization_config": quantised, **others}
    )
    table = model.weight_table()
    return {
        n: (d, s) for n, d, s in zip(table["name"], table["dtype"], table["shape"], strict=True)
    }


def theirs(name: str, quantised: dict[str, Any]) -> Tensors:
    pytest.importorskip("torchao", reason="the library that quantises is the oracle")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_
    from transformers import TorchAoConfig

    live = live_model(TINY[name], device="cpu")
    made = TorchAoConfig.from_dict({k: v for k, v in quantised.items() if k != "quant_method"})
    quantiser = TorchAoHfQuantizer(made)
    quantiser._process_model_before_weight_loading(live)
    modules = dict(live.named_modules())
    for parameter in [n for n, _ in live.named_parameters()]:
        if quantiser.param_needs_quantization(live, parameter):
            quantize_(modules[parameter.rpartition(".")[0]], made.quant_type)
    kept, _ = flatten_tensor_state_dict(
        {n: p.data for n, p in live.named_parameters()}  # tied weights once, no buffers
    )
    return {n: (DTYPES[str(t.dtype)], tuple(t.shape)) for n, t in kept.items()}


@pytest.mark.parametrize("name", ["llama", "llama with biases, tied", "mixtral", "gpt2"])
@pytest.mark.parametrize(
    "quantised",
    [
        config(INT8),
        config(INT8, granularity=GROUP),
        config(INT8, granularity=TENSOR),
        config(INT8_DYNAMIC, granularity=ROW),
        config(INT8_DYNAMIC, granularity=[ROW, TENSOR]),
        config(
            FLOAT8, granularity=ROW, weight_dtype={"_type": "torch.dtype", "_data": "float8_e4m3fn"}
        ),
        config(FLOAT8, granularity=TENSOR),
        config(FLOAT8, granularity=GROUP),
        {**config(INT8), "modules_to_not_convert": ["mlp.up_proj", "model.layers.1"]},
        {**config(INT8), "modules_to_not_convert": [r"model.layers.\d.mlp", "down_proj.weight"]},
    ],
)
def test_tensors_are_those_of_the_library(name, quantised):
    assert ours(name, quantised) == theirs(name, quantised)


def test_int4_is_packed_in_pairs_with_groups_down_the_scales():
    """Int4Tensor's documentation: qdata (N, K/2), scale and zero point (K/group_size, N)."""
    made = ours("llama", config(INT4, group_size=32))
    name = "model.layers.0.mlp.down_proj._weight"
    assert made[f"{name}_qdata"] == ("int8", (64, 80))
    assert made[f"{name}_scale"] == made[f"{name}_zero_point"] == ("bf16", (5, 64))


def test_int4_leaves_rows_that_groups_do_not_divide():
    made = ours("llama", config(INT4))  # groups of 128
    assert made == ours("llama", config(INT4, group_size=128))
    assert made["model.layers.0.mlp.down_proj.weight"] == ("bf16", (64, 160))


def test_float8_activations_need_sides_of_sixteen():
    """_fp8_mm_compat of torchao: other weights stay as they are."""
    made = ours("llama", config(FLOAT8_DYNAMIC), intermediate_size=72)
    name = "model.layers.0."
    assert made[f"{name}mlp.up_proj.weight"] == ("bf16", (72, 64))
    assert made[f"{name}self_attn.q_proj._weight_scale"] == ("fp32", (1, 1))
    by_row = ours("llama", config(FLOAT8_DYNAMIC, granularity=[ROW, ROW]))
    assert by_row[f"{name}mlp.up_proj._weight_scale"] == ("fp32", (160, 1))


@pytest.mark.parametrize(
    ("quantised", "message"),
    [
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "quant_type='int4_weight"),
        (config("FqnToConfig"), "_type='FqnToConfig' is not allowed"),
        (config(INT8, version=1), "_version=1 is not read: 2"),
        (config(INT4, group_size=0), "group_size=0 is not allowed"),
        (config(INT4, int4_packing_format="preshuffled"), "int4_packing_format='preshuffled' is"),
        (config(INT8, granularity="PerRow"), "granularity='PerRow' is not allowed"),
        (config(INT8, granularity={**ROW, "_data": {"dim": 0}}), "rows, dim -1"),
        (config(INT8_DYNAMIC, granularity=GROUP), "granularity='PerGroup' is not allowed"),
        ({**config(INT8), "include_input_output_embeddings": True}, "embeddings=True is not read"),
        (config(INT8, granularity={**GROUP, "_data": {"group_size": 48}}), "48 does not divide"),
    ],
)
def test_bad_settings_are_named(quantised, message):
    with pytest.raises(ConfigError, match=message):
        ours("llama", quantised)
