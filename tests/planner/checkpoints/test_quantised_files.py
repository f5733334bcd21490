"""Quantised folders beside their config. The tensors are those that the libraries make, or are laid
out by hand as the published files are.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import planner
from planner.checkpoints.checkpoint import compare_files
from tests.planner.configs import TINY, build
from tests.planner.quantization import test_bitsandbytes as bnb
from tests.planner.quantization import test_compressed as compressed
from tests.planner.quantization import test_gptq as gptq

TORCH = {
    "fp8": torch.float8_e4m3fn,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
}


def write(folder, name, quantised, tensors, dtype="bfloat16"):
    config = {**TINY[name], "torch_dtype": dtype, "quantization_config": quantised}
    (folder / "config.json").write_text(json.dumps(config))
    kept = {n: t.contiguous() for n, t in tensors.items() if "inv_freq" not in n}
    save_file(kept, folder / "model.safetensors")


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def found(folder) -> dict[str, planner.Finding]:
    return {finding.id: finding for finding in compare_files(folder)[1]}


def compressed_tensors(name: str, quantised: dict[str, Any]) -> dict[str, torch.Tensor]:
    made = compressed.theirs(name, quantised)
    return {n: torch.zeros(shape, dtype=TORCH[dtype]) for n, (dtype, shape) in made.items()}


def gptq_tensors(name: str, group_size: int) -> dict[str, torch.Tensor]:
    """The live class's weights, its blocks' linear layers packed as test_gptq lays them out."""
    live = build(TINY[name], device="cpu", dtype=torch.float16)
    tensors = dict(live.state_dict())
    for module_name, module in live.named_modules():
        if isinstance(module, torch.nn.Linear) and module_name != "lm_head":
            out, into = tensors.pop(f"{module_name}.weight").shape
            for part, (dtype, shape) in gptq.layer(out, into, 4, group_size).items():
                tensors[f"{module_name}.{part}"] = torch.zeros(shape, dtype=TORCH[dtype])
    return tensors


def fp8_tensors(name: str) -> dict[str, torch.Tensor]:
    """As DeepSeek-V3's files: float8 weights, a float32 for each block of 128 × 128."""
    live = build(TINY[name], device="cpu", dtype=torch.bfloat16)
    tensors = dict(live.state_dict())
    for module_name, module in live.named_modules():
        if isinstance(module, torch.nn.Linear) and module_name != "lm_head":
            weight = tensors[f"{module_name}.weight"]
            tensors[f"{module_name}.weight"] = weight.to(torch.float8_e4m3fn)
            blocks = [-(-size // 128) for size in weight.shape]
            tensors[f"{module_name}.weight_scale_inv"] = torch.ones(blocks)
    return tensors


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
W4A16 = compressed.CASES["w4a16"]


@bnb.with_library
@pytest.mark.parametrize(
    ("name", "settings"), [("llama", bnb.NF4), ("llama", bnb.EIGHT), ("mixtral", bnb.NF4)]
)
def test_what_bitsandbytes_saves_is_what_the_config_says(tmp_path, name, settings):
    quantised = {"quant_method": "bitsandbytes", **settings}
    write(tmp_path, name, quantised, bnb.live_state(name, settings))
    assert found(tmp_path) == {}


@bnb.with_library
def test_nf4_files_under_an_int8_config_are_named(tmp_path):
    quantised = {"quant_method": "bitsandbytes", **bnb.EIGHT}
    write(tmp_path, "llama", quantised, bnb.live_state("llama", bnb.NF4))
    findings = found(tmp_path)
    assert findings["missing-tensors"].severity == "error"
    assert "SCB" in findings["missing-tensors"].seen
    assert {"other-shapes", "other-dtype", "extra-tensors"} <= set(findings)


@pytest.mark.parametrize("case", ["w4a16", "w4a16, asymmetric", "w8a8"])
def test_what_compressed_tensors_writes_is_what_the_config_says(tmp_path, case):
    quantised = compressed.CASES[case]
    write(tmp_path, "llama", quantised, compressed_tensors("llama", quantised))
    assert found(tmp_path) == {}


@pytest.mark.parametrize("group_size", [32, -1])
def test_gptq_layers_are_compared(tmp_path, group_size):
    quantised = {**GPTQ, "group_size": group_size}
    write(tmp_path, "llama", quantised, gptq_tensors("llama", group_size), "float16")
    assert found(tmp_path) == {}


def test_fp8_blocks_are_compared(tmp_path):
    write(tmp_path, "llama", FP8, fp8_tensors("llama"))
    assert found(tmp_path) == {}


def test_another_group_size_is_another_shape(tmp_path):
    write(tmp_path, "llama", {**GPTQ, "group_size": 64}, gptq_tensors("llama", 32), "float16")
    finding = found(tmp_path)["other-shapes"]
    assert finding.severity == "error"
    assert "scales" in finding.seen or "qzeros" in finding.seen


def test_a_missing_scale_is_an_error(tmp_path):
    write(tmp_path, "llama", FP8, fp8_tensors("llama"))
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    finding = found(tmp_path)["missing-tensors"]
    assert finding.title == "1 tensors of the config are in no file"
    assert name in finding.seen


def test_scales_of_another_dtype_are_said_with_both_sizes(tmp_path):
    write(tmp_path, "llama", FP8, fp8_tensors("llama"))
    name = "model.layers.1.mlp.down_proj.weight_scale_inv"
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[name].half()}))
    finding = found(tmp_path)["other-dtype"]
    assert finding.title == "1 tensors are F16, the config asks for F32"


def test_a_layer_quantised_against_the_ignore_list_is_named(tmp_path):
    quantised = {**W4A16, "ignore": ["lm_head", "re:.*down_proj"]}
    write(tmp_path, "llama", quantised, compressed_tensors("llama", W4A16))
    findings = found(tmp_path)
    assert "down_proj.weight" in findings["missing-tensors"].seen
    assert "down_proj" in findings["extra-tensors"].seen


def test_a_layer_left_unquantised_is_named(tmp_path):
    write(tmp_path, "llama", FP8, fp8_tensors("llama"))
    name = "model.layers.0.self_attn.q_proj.weight"

    def plain(tensors):
        tensors[name] = tensors[name].to(torch.bfloat16)
        del tensors[f"{name}_scale_inv"]

    rewrite(tmp_path, plain)
    findings = found(tmp_path)
    assert findings["other-dtype"].title == "1 tensors are BF16, the config asks for F8"
    assert f"{name}_scale_inv" in findings["missing-tensors"].seen


def test_routed_experts_are_compared_one_by_one(tmp_path):
    """Each of mixtral's experts as the fp8 files of transformers have it."""
    write(tmp_path, "mixtral", FP8, {})
    model = planner.load_model(tmp_path)
    tensors = {}
    for _, stored in model.stored_tensors():
        for e in range(stored.copies):
            name = stored.name.replace("experts.*", f"experts.{e}")
            tensors[name] = torch.zeros(stored.shape, dtype=TORCH[stored.dtype])
    assert sum(".experts.3." in name for name in tensors) == 3 * 3 * 2  # layers, parts, scales
    save_file(tensors, tmp_path / "model.safetensors")
    assert found(tmp_path) == {}
    rewrite(tmp_path, lambda t: t.pop(next(n for n in t if ".experts.3.down_proj.weight" in n)))
    assert found(tmp_path)["other-shapes"].severity == "error"


def test_quantised_files_without_a_word_of_it_are_a_warning(tmp_path):
    write(tmp_path, "llama", FP8, fp8_tensors("llama"))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    finding = found(tmp_path)["quantised"]
    assert (finding.severity, finding.seen) == ("warning", "quantization_config is missing")


def test_a_method_whose_files_are_not_compared_says_so(tmp_path):
    quantised = {"quant_method": "quanto", "weights": "int8"}
    live = build(TINY["llama"], device="cpu", dtype=torch.bfloat16)
    write(tmp_path, "llama", quantised, dict(live.state_dict()))
    assert found(tmp_path)["quantised"].title == (
        "Files of quanto are not compared with the config yet"
    )
