"""Oracle: AutoAWQ's buffers, put where transformers puts them in the live class."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations.awq import replace_with_awq_linear
from transformers.quantizers.base import HfQuantizer

import planner
from planner import ConfigError
from tests.planner.configs import TINY
from tests.planner.oracle import live_model

DTYPES = {torch.int32: "int32", torch.float16: "fp16", torch.bfloat16: "bf16"}
WIDE = {"hidden_size": 256, "intermediate_size": 384, "torch_dtype": "float16"}
LLAMA = {**TINY["llama"], **WIDE}
BIASED = {**TINY["llama with biases, tied"], **WIDE}


class Packed(nn.Module):
    """The buffers of AutoAWQ's WQLinear_GEMM and WQLinear_GEMV (awq/modules/linear/)."""

    def __init__(self, *, group_size, in_features, out_features, bias, version, **_):
        super().__init__()
        group_size = in_features if group_size == -1 else group_size
        groups = in_features // group_size
        if version == "gemm":
            shapes = (
                (in_features, out_features // 8),
                (groups, out_features // 8),
                (groups, out_features),
            )
        else:
            times = {128: 1, 64: 2, 32: 4}[min(group_size, 128)]
            width = (groups + 7) // 8
            width = (width + times - 1) // times * times
            shapes = (
                (out_features, in_features // 8),
                (out_features, width),
                (out_features, width * 8),
            )
        for name, shape in zip(("qweight", "qzeros", "scales"), shapes, strict=True):
            dtype = torch.float16 if name == "scales" else torch.int32
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))
        if bias:
            self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float16))


@pytest.fixture
def gptqmodel(monkeypatch):
    """The names that transformers asks gptqmodel for; the layer is AutoAWQ's."""

    def select(*, format, **_):
        return lambda **given: Packed(version=format, **given)

    parts = {
        "gptqmodel": SimpleNamespace(),
        "gptqmodel.quantization": SimpleNamespace(METHOD=SimpleNamespace(AWQ="awq")),
        "gptqmodel.utils": SimpleNamespace(),
        "gptqmodel.utils.importer": SimpleNamespace(hf_select_quant_linear_v2=select),
    }
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)


def live_tensors(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    live = live_model(config)
    asked = SimpleNamespace(
        bits=4,
        group_size=settings.get("group_size", 128),
        format=settings.get("version", "gemm"),
        backend="auto",
        zero_point=True,
        sym=True,
        desc_act=False,
    )
    skipped = HfQuantizer.get_modules_to_not_convert(
        live, settings.get("modules_to_not_convert"), None, add_default_skips=True
    )
    replace_with_awq_linear(live, skipped, asked)
    kept = dict(live.named_parameters()) | {
        n: b for n, b in live.named_buffers() if "inv_freq" not in n
    }
    dtypes = {n: "fp16" if t.dtype == torch.bfloat16 else DTYPES[t.dtype] for n, t in kept.items()}
    return {n: (dtypes[n], tuple(t.shape)) for n, t in kept.items()}


def ours(config: dict[str, Any], **settings: Any) -> planner.Model:
    quantised = {"quant_method": "awq", "bits": 4, **settings}
    return planner.read_config({**config, "quantization_config": quantised})


@pytest.mark.parametrize("version", ["gemm", "gemv"])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize(
    ("config", "skipped"),
    [
        (LLAMA, None),
        (BIASED, None),
        (LLAMA, ["self_attn"]),
        (LLAMA, ["model.layers.1", "mlp.down_proj"]),
    ],
)
@pytest.mark.usefixtures("gptqmodel")
def test_tensors_are_those_of_the_replaced_modules(config, skipped, version, group_size):
    settings = {"version": version, "group_size": group_size}
    if skipped == ["self_attn"]:  # a part of a name is enough for AutoAWQ, transformers wants ends
        theirs = {"modules_to_not_convert": [r".*self_attn"], **settings}
    else:
        theirs = {"modules_to_not_convert": skipped, **settings}
    table = ours(config, modules_to_not_convert=skipped, **settings).weight_table()
    rows = zip(table["name"], table["dtype"], table["shape"], strict=True)
    found = {name: (dtype, shape) for name, dtype, shape in rows}
    assert found == live_tensors(config, theirs)


def test_routed_experts_are_single_layers_and_routers_stay():
    config = {**TINY["mixtral"], **WIDE, "num_local_experts": 4}
    table = ours(config, modules_to_not_convert=["gate", "experts.2.down_proj"]).weight_table()
    table = table.set_index("name")
    stem = "model.layers.0.mlp.experts.*"
    assert table.loc[f"{stem}.down_proj.qweight", "copies"] == 3
    assert table.loc[f"{stem}.down_proj.weight", ["shape", "copies"]].tolist() == [(256, 384), 1]
    assert f"{stem}.gate_proj.weight" in table.index  # "gate" is a part of its name
    assert table.loc[f"{stem}.up_proj.scales", "shape"] == (2, 384)


def test_a_weight_costs_four_bits_and_its_share_of_a_group():
    """4 bits, and for 128 weights a scale of 16 bits and a zero point of 4."""
    table = ours(LLAMA, group_size=128).weight_table()
    packed = table[table["name"].str.endswith(("qweight", "qzeros", "scales"))]
    weights = 3 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 384)
    assert packed["bytes"].sum() * 8 == weights * (4 + 20 / 128)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 8}, "bits=8 is not allowed: 4"),
        ({"zero_point": False}, "zero_point=False is not read yet: true"),
        ({"version": "gemv_fast"}, "version='gemv_fast' is not allowed: one of gemm, gemv"),
        ({"version": 3}, "version=3 is not allowed"),
        ({"group_size": 0}, "group_size=0 is not allowed"),
        ({"backend": "llm-awq"}, "backend='llm-awq' is not read yet"),
        ({"modules_to_not_convert": "gate"}, "modules_to_not_convert='gate' is not allowed"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        ours(LLAMA, **settings)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (LLAMA, {"group_size": 100}),
        (LLAMA, {"group_size": 16, "version": "gemv"}),
        ({**LLAMA, "intermediate_size": 1028}, {"group_size": 4}),
    ],
)
def test_groups_and_words_that_do_not_divide_are_refused(config, settings):
    with pytest.raises(ConfigError, match=r"group_size=.* is not allowed for model\.layers\.0"):
        ours(config, **settings).weight_table()
