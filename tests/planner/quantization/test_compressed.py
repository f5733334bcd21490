"""Oracle: compressed_tensors itself, compressing the live class on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from tests.planner.configs import TINY
from tests.planner.oracle import live_model
from tests.properties import examples

DTYPES = {
    "torch.float8_e4m3fn": "fp8",
    "torch.uint8": "uint8",
    "torch.int8": "int8",
    "torch.int32": "int32",
    "torch.int64": "int64",
    "torch.float32": "fp32",
    "torch.bfloat16": "bf16",
}
W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
W8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def group(format_: str, weights: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {"targets": ["Linear"], "format": format_, "weights": weights, **others}


def config(*groups: dict[str, Any], **others: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {f"group_{i}": one for i, one in enumerate(groups)},
        "format": groups[0].get("format") if len(groups) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        **others,
    }


def ours(name: str, quantised: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    model = planner.read_config(
        {**TINY[name], "torch_dtype": "bfloat16", "quantization_config": quantised}
    )
    table = model.weight_table()
    return {
        n: (d, s) for n, d, s in zip(table["name"], table["dtype"], table["shape"], strict=True)
    }


def theirs(name: str, quantised: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    reason = "the library that writes these files is the oracle"
    pytest.importorskip("compressed_tensors", reason=reason)
    from compressed_tensors.compressors import compress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    live = live_model(TINY[name], device="cpu")
    made = QuantizationConfig(**quantised)
    apply_quantization_config(live, made, show_progress=False)
    for tensor_name, tensor in live.named_parameters():
        if tensor_name.endswith(("_scale", "_zero_point")):
            tensor.data.fill_(0 if tensor_name.endswith("point") else 1)
    for module in live.modules():
        if getattr(module, "quantization_scheme", None) and hasattr(module, "weight"):
            compress_module(module)
    kept = {n: t for n, t in live.state_dict().items() if "correction_bias" not in n}  # a buffer
    if live.config.tie_word_embeddings:
        kept.pop("lm_head.weight")
    return {n: (DTYPES[str(t.dtype)], tuple(t.shape)) for n, t in kept.items()}


def assert_same(name: str, quantised: dict[str, Any]) -> None:
    got, expected = ours(name, quantised), theirs(name, quantised)
    missing = {n: s for n, s in expected.items() if got.get(n) != s}
    invented = {n: s for n, s in got.items() if expected.get(n) != s}
    assert (missing, invented) == ({}, {})


CASES = {
    "w4a16": config(group("pack-quantized", W4)),
    "w4a16, asymmetric": config(group("pack-quantized", {**W4, "symmetric": False})),
    "w3, by channel, asymmetric": config(
        group("pack-quantized", {**W8, "num_bits": 3, "symmetric": False})
    ),
    "w8a16, one scale, asymmetric": config(
        group("pack-quantized", {**W8, "strategy": "tensor", "symmetric": False})
    ),
    "w4a16, columns ordered in calibration": config(
        group("pack-quantized", {**W4, "actorder": "static"})
    ),
    "w8a8": config(group("int-quantized", W8, input_activations={**TOKEN, "type": "int"})),
    "w8a8, static, asymmetric": config(
        group(
            "int-quantized",
            {**W8, "strategy": None, "symmetric": False},
            input_activations={**STATIC, "type": "int", "symmetric": False},
            output_activations={**STATIC, "type": "int"},
        )
    ),
    "w8a8 by group": config(group("int-quantized", {**W4, "num_bits": 8})),
    "fp8, dynamic": config(group("float-quantized", FP8, input_activations=TOKEN)),
    "fp8, static, cache too": config(
        group("float-quantized", {**FP8, "strategy": "tensor"}, input_activations=STATIC),
        kv_cache_scheme=STATIC,
    ),
    "fp8 by block": config(
        group("float-quantized", {**FP8, "strategy": "block", "block_structure": [24, 48]})
    ),
    "naive": config(group("naive-quantized", FP8)),
    "nvfp4": config(
        group("nvfp4-pack-quantized", FP4, input_activations={**FP4, "dynamic": "local"})
    ),
    "nvfp4a16": config(group("nvfp4-pack-quantized", FP4)),
    "mxfp4": config(group("mxfp4-pack-quantized", {**FP4, "strategy": "group", "group_size": 32})),
    "mxfp8": config(
        group(
            "mxfp8-quantized",
            {**FP8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        )
    ),
    "a format for each group": config(
        {**group("pack-quantized", W4), "targets": ["re:.*mlp.*"]},
        {**group("float-quantized", FP8), "targets": ["Linear"]},
        {**group("int-quantized", W8), "targets": ["model.layers.1.mlp.up_proj"]},
        ignore=["re:.*o_proj", "model.layers.0.self_attn.q_proj", "lm_head"],
    ),
    "embedding too": config({**group("int-quantized", W8), "targets": ["Embedding"]}, ignore=None),
    "ignored by class": config(
        {**group("int-quantized", W8), "targets": ["re:model"]}, ignore=["Embedding"]
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "llama with biases, tied"])
def test_tensors_are_those_of_the_library(name, case):
    assert_same(name, CASES[case])


@pytest.mark.parametrize("name", ["deepseek_v3", "phi3", "gemma2", "gpt2"])
def test_other_attentions_have_the_scales_of_a_cache(name):
    quantised = config(
        group("float-quantized", FP8),
        kv_cache_scheme={**STATIC, "symmetric": False},
        ignore=["lm_head", "re:.*experts.*"],
    )
    assert_same(name, quantised)


@given(
    bits=st.integers(1, 8),
    size=st.integers(1, 200),
    symmetric=st.booleans(),
)
@examples(15)
def test_any_group_is_covered_by_its_scales(bits, size, symmetric):
    weights = {**W4, "num_bits": bits, "group_size": size, "symmetric": symmetric}
    divides = not (64 % size or 160 % size)
    if divides:  # the library quantises no other groups, though it makes their scales
        assert_same("llama", config(group("pack-quantized", weights)))
    made = ours("llama", config(group("pack-quantized", weights)))
    assert made["model.layers.0.mlp.down_proj.weight_scale"] == ("bf16", (64, -(-160 // size)))


def test_each_routed_expert_is_packed_alone():
    """The files of llm-compressor: `experts.<i>.gate_proj`, `up_proj`, `down_proj`."""
    made = ours("mixtral", config(group("pack-quantized", W4)))
    packed = {n: s for n, s in made.items() if ".layers.0." in n and "experts" in n}
    names = {n.rpartition("experts.*.")[2] for n in packed}
    parts = ("weight_packed", "weight_shape", "weight_scale")
    assert names == {f"{m}_proj.{p}" for m in ("gate", "up", "down") for p in parts}
    up = next(s for n, s in packed.items() if n.endswith("up_proj.weight_packed"))
    assert up == ("int32", (160, 64 * 4 // 32))


def test_activation_order_by_group_keeps_an_index():
    """A column's group, int32: files of compressed_tensors before 0.20, which dropped it."""
    made = ours("llama", config(group("pack-quantized", {**W4, "actorder": "group"})))
    assert made["model.layers.0.mlp.down_proj.weight_g_idx"] == ("int32", (160,))


def test_files_of_older_versions_name_the_format_once():
    one = {k: v for k, v in group("pack-quantized", W4).items() if k != "format"}
    older = config(one, format="pack-quantized", quantization_status="frozen")
    older["sparsity_config"] = {"format": "dense"}
    assert ours("llama", older) == ours("llama", CASES["w4a16"])


BAD = [
    (config(group("marlin-24", W4)), "format='marlin-24' is not allowed"),
    (config(group("pack-quantized", {**W4, "num_bits": 9})), "num_bits=9 is not allowed in pack"),
    (config(group("pack-quantized", {**W4, "type": "float"})), "type='float' is not allowed"),
    (config(group("pack-quantized", {**W4, "group_size": 0})), "group_size=0 is not allowed"),
    (config(group("pack-quantized", {**W4, "group_size": None})), "group_size=None is not allow"),
    (config(group("pack-quantized", {**W4, "dynamic": True})), "dynamic=True, strategy='group'"),
    (config(group("pack-quantized", {**W4, "actorder": "up"})), "actorder='up' is not allowed"),
    (config(group("nvfp4-pack-quantized", {**FP4, "group_size": 8})), "is not read in nvfp4"),
    (config(group("float-quantized", {**FP8, "strategy": "block"})), "block_structure=None is not"),
    (config(group("float-quantized", {**FP8, "strategy": 3})), "strategy=3 is not allowed"),
    (config({**group("float-quantized", FP8), "weights": None}), "weights=None is"),
    (config({"targets": [], "format": "pack-quantized", "weights": W4}), r"targets=\[\] is not"),
    (config(group("float-quantized", FP8), ignore=["re:("]), r"has 're:\('"),
    (config(group("float-quantized", FP8), ignore=["a.experts.3.b"]), "a part of the routed"),
    (config(group("float-quantized", FP8), quantization_status="initialized"), "status='initial"),
    (config(group("float-quantized", FP8), sparsity_config={"format": "x"}), "sparsity_config="),
    (config(group("float-quantized", FP8), kv_cache_scheme={**FP8, "strategy": "attn_head"}), "ke"),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, r"config_groups=\{\} is not"),
    ({"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}, "W4A16=.*not"),
]


@pytest.mark.parametrize(("quantised", "message"), BAD)
def test_bad_settings_are_named(quantised, message):
    with pytest.raises(ConfigError, match=message):
        ours("llama", quantised)


def test_columns_that_do_not_divide_are_named():
    narrow = {**FP4, "strategy": "group", "group_size": 32}
    tiny = {
        **TINY["llama"],
        "intermediate_size": 72,
        "quantization_config": config(group("mxfp4-pack-quantized", narrow)),
    }
    with pytest.raises(ConfigError, match="72 columns are not a multiple of 32"):
        planner.read_config(tiny).weight_table()
