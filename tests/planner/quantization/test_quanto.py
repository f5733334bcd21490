"""Oracle: QLinear of optimum.quanto, put into the live class as transformers puts it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import QuantoConfig
from transformers.quantizers.base import HfQuantizer

import planner
from planner import ConfigError
from planner.quantization import METHODS
from planner.tensors import Parameter
from tests.planner.configs import TINY
from tests.planner.oracle import live_model
from tests.properties import examples

DTYPES = {
    "torch.float8_e4m3fn": "fp8",
    "torch.uint8": "uint8",
    "torch.int8": "int8",
    "torch.float32": "fp32",
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
}
WEIGHTS = ("int8", "int4", "int2", "float8")
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def library() -> Any:
    return pytest.importorskip("optimum.quanto", reason="the library that quantises is the oracle")


def kept(module: torch.nn.Module) -> Tensors:
    """Its state, with the layers frozen as QuantoQuantize of transformers does."""
    for layer in module.modules():
        if hasattr(layer, "freeze"):
            layer.input_scale, layer.output_scale = torch.ones(()), torch.ones(())
            layer.freeze()
    found = {n: t for n, t in module.state_dict().items() if "correction_bias" not in n}  # buffers
    return {n: (DTYPES[str(t.dtype)], tuple(t.shape)) for n, t in found.items()}


def theirs(name: str, settings_: dict[str, Any]) -> Tensors:
    library()
    from transformers.integrations.quanto import replace_with_quanto_layers

    live, config = live_model(TINY[name]), QuantoConfig(**settings_)
    skipped = HfQuantizer.get_modules_to_not_convert(live, config.modules_to_not_convert)
    replace_with_quanto_layers(live, config, skipped)
    made = kept(live.to_empty(device="cpu"))
    if live.config.tie_word_embeddings:
        made.pop("lm_head.weight")
    return made


def ours(name: str, **settings_: Any) -> Tensors:
    quantised = {"quant_method": "quanto", **settings_}
    model = planner.read_config(
        {**TINY[name], "torch_dtype": "bfloat16", "quantization_config": quantised}
    )
    table = model.weight_table()
    return {
        n: (d, s) for n, d, s in zip(table["name"], table["dtype"], table["shape"], strict=True)
    }


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    "name", ["llama", "llama with biases, tied", "mixtral", "deepseek_v3", "gpt2"]
)
def test_tensors_are_those_of_the_library(name, weights):
    assert ours(name, weights=weights) == theirs(name, {"weights": weights})


@pytest.mark.parametrize("skipped", [["mlp.down_proj"], ["model.layers.1"], []])
def test_skipped_modules_stay(skipped):
    settings_ = {"weights": "int4", "modules_to_not_convert": skipped}
    assert ours("llama", **settings_) == theirs("llama", settings_)


@given(
    out=st.integers(1, 40),
    into=st.integers(1, 40) | st.sampled_from([128, 160, 192, 200, 256, 288, 384]),
    weights=st.sampled_from(WEIGHTS),
    dtype=st.sampled_from(["bf16", "fp16", "fp32"]),
)
@examples(60)
def test_any_shape_is_packed_alike(out, into, weights, dtype):
    # the library's int4 kernel for CPUs takes rows by 16
    assume(not (weights == "int4" and dtype == "bf16" and into % 128 == 0 and out % 16))
    quanto = library()
    kind = getattr(quanto, f"q{weights}")
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    layer = torch.nn.Linear(into, out, bias=False, dtype=torch_dtype)
    expected = kept(torch.nn.ModuleDict({"a": quanto.QLinear.from_module(layer, weights=kind)}))
    parameter = Parameter(
        name="a.weight", group="attention", layer=0, shape=(out, into), linear=True
    )
    made = METHODS["quanto"]({"weights": weights}).stored(parameter, dtype)
    assert {s.name: (s.dtype, s.shape) for s in made} == expected


def test_a_row_is_one_group_unless_32_divides_it():
    """As optimum.quanto 0.2.7 has saved them, where it is not installed."""
    made = ours("llama", weights="int4")
    name = "model.layers.0.mlp"
    assert made[f"{name}.down_proj.weight._data._data"] == ("uint8", (160, 32))
    assert made[f"{name}.down_proj.weight._scale"] == ("bf16", (320, 1))
    assert made[f"{name}.up_proj.weight._data._data"] == ("uint8", (80, 64))
    assert made[f"{name}.up_proj.input_scale"] == ("fp32", ())


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"weights": "int3"}, "weights='int3' is not allowed"),
        ({"weights": ["int8"]}, r"weights=\['int8'\] is not allowed"),
        ({"activations": "int8"}, "activations='int8' is not loaded by transformers"),
        ({"modules_to_not_convert": 3}, "modules_to_not_convert=3 is not allowed"),
    ],
)
def test_bad_settings_are_named(settings_, message):
    with pytest.raises(ConfigError, match=message):
        ours("llama", **settings_)
