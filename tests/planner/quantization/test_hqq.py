"""Oracle: HQQLinear itself, put by hand into the live class: transformers 5.23 does not yet.

hqq is no dependency of ours: where it is installed, `import transformers` warns (torch.jit). Run
these by hand with `-o filterwarnings=default` and hqq 0.2.8 on the path.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.integrations.hqq import name_to_linear_tag

import planner
from planner import ConfigError
from tests.planner.configs import TINY
from tests.planner.oracle import live_model

NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


def params(**settings_: Any) -> dict[str, Any]:
    """As BaseQuantizeConfig of hqq makes it and config.json keeps it."""
    given = {"nbits": 4, "group_size": 32, "axis": 1, "view_as_float": False, **settings_}
    rest = {"channel_wise": True, "optimize": True, "round_zero": given["nbits"] == 4}
    return {
        "weight_quant_params": given | rest,
        "scale_quant_params": None,
        "zero_quant_params": None,
        "offload_meta": False,
    }


def config(quant_config: Any, skip: Any = ("lm_head",)) -> dict[str, Any]:
    skipped = list(skip) if isinstance(skip, tuple) else skip
    return {"quant_method": "hqq", "quant_config": quant_config, "skip_modules": skipped}


def ours(name: str, quantised: dict[str, Any], dtype: str = "bfloat16") -> Tensors:
    model = planner.read_config(
        {**TINY[name], "torch_dtype": dtype, "quantization_config": quantised}
    )
    table = model.weight_table()
    return {
        n: (d, s) for n, d, s in zip(table["name"], table["dtype"], table["shape"], strict=True)
    }


def theirs(name: str, quantised: dict[str, Any], dtype: str = "bfloat16") -> Tensors:
    hqq = pytest.importorskip(
        "hqq.core.quantize", reason="the library that quantises is the oracle"
    )
    live = live_model(TINY[name], device="cpu").to(getattr(torch, dtype))
    expected: Tensors = {}
    modules = dict(live.named_modules())
    for parameter, tensor in live.named_parameters():
        module = parameter.rpartition(".")[0]
        found = quantised["quant_config"]
        tag = name_to_linear_tag(module)
        if "weight_quant_params" not in found:
            found = found.get(tag)
        elif tag in quantised["skip_modules"]:
            found = None
        linear = isinstance(modules[module], torch.nn.Linear) and parameter.endswith(".weight")
        state = {parameter: tensor}
        if found and linear:
            made = hqq.HQQLinear(
                modules[module],
                {**found, "weight_quant_params": dict(found["weight_quant_params"])},
                compute_dtype=getattr(torch, dtype),
                device="cpu",
                del_orig=False,
            )
            state = {f"{module}.{n}": t for n, t in made.state_dict().items() if n != "bias"}
        for n, t in state.items():
            kind = str(t.dtype).removeprefix("torch.")
            expected[n] = (NAMES.get(kind, kind), tuple(t.shape))
    return expected


@pytest.mark.parametrize("nbits", [8, 6, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group_size", [32, 40, None])
def test_tensors_are_those_of_the_library(nbits, axis, group_size):
    quantised = config(params(nbits=nbits, axis=axis, group_size=group_size))
    if group_size == 40:  # divides no other layer of this model
        quantised["quant_config"] = {"mlp.down_proj": quantised["quant_config"]}
    assert ours("llama", quantised) == theirs("llama", quantised)


@pytest.mark.parametrize("name", ["llama with biases, tied", "mixtral"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_models_and_dtypes(name, dtype):
    quantised = config(params(), ("lm_head", "self_attn.k_proj", "up_proj"))
    assert ours(name, quantised, dtype) == theirs(name, quantised, dtype)


@pytest.mark.parametrize(
    ("nbits", "axis", "words", "scale"),
    [
        (8, 0, ("uint8", (32, 320)), (1, 320)),
        (4, 1, ("uint8", (160, 32)), (320, 1)),
        (3, 0, ("int32", (4, 320)), (1, 320)),
        (3, 1, ("int32", (32, 32)), (320, 1)),
        (1, 1, ("uint8", (40, 32)), (320, 1)),
    ],
)
def test_shapes_are_those_that_hqq_has_saved(nbits, axis, words, scale):
    """HQQLinear of hqq 0.2.8 from Linear(160, 64), groups of 32."""
    made = ours("llama", config(params(nbits=nbits, axis=axis)))
    name = "model.layers.0.mlp.down_proj"
    assert made[f"{name}.W_q"] == words
    assert made[f"{name}.scale"] == made[f"{name}.zero"] == ("bf16", scale)
    assert made[f"{name}.compute_dtype"] == ("uint8", (14,))


def test_each_kind_of_layer_may_have_its_own_bits():
    quantised = config({"self_attn.q_proj": params(nbits=8), "mlp.up_proj": params(nbits=2)})
    assert ours("llama", quantised) == theirs("llama", quantised)


@pytest.mark.parametrize(
    ("quantised", "message"),
    [
        (config(None), "quant_config=None is not allowed"),
        (config({"mlp.up_proj": 3}), "quant_config.mlp.up_proj=3 is not allowed"),
        (config(params(nbits=7)), "nbits=7 is not allowed: 8, 6"),
        (config(params(group_size=12)), "group_size=12 is not allowed: a multiple of 8"),
        (config(params(axis=2)), "axis=2 is not allowed"),
        (config(params(view_as_float=True)), "view_as_float=True is not read"),
        (config(params() | {"offload_meta": True}), "offload_meta=True is not read"),
        (config(params(), "lm_head"), "skip_modules='lm_head' is not allowed"),
        (config(params(group_size=48)), "group_size=48, nbits=4 does not divide model.layers.0"),
    ],
)
def test_bad_settings_are_named(quantised, message):
    with pytest.raises(ConfigError, match=message):
        ours("llama", quantised)
