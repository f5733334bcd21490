"""Where transformers dequantises fp8 and MXFP4 checkpoints: its own quantisers are asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import FineGrainedFP8Config, Mxfp4Config
from transformers.quantizers import quantizer_finegrained_fp8, quantizer_mxfp4

import planner
from planner import Deployment, Inference
from planner.catalog.gpus import gpu_named, gpus
from planner.quantization.unpacked import unpacked_on
from tests.planner.configs import TINY

NVIDIA = [name for name, gpu in gpus().items() if gpu.vendor == "nvidia"]


def capability(name):
    major, minor = gpu_named(name).compute_capability.split(".")
    return int(major), int(minor)


@pytest.mark.parametrize("gpu", NVIDIA)
@pytest.mark.parametrize(
    ("method", "module", "quantiser", "config"),
    [
        ("fp8", quantizer_finegrained_fp8, "FineGrainedFP8HfQuantizer", FineGrainedFP8Config),
        ("mxfp4", quantizer_mxfp4, "Mxfp4HfQuantizer", Mxfp4Config),
    ],
)
def test_the_quantiser_of_transformers_decides_alike(
    gpu, method, module, quantiser, config, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability(gpu))
    monkeypatch.setattr(module, "is_accelerate_available", lambda: True)
    for package in ("is_triton_available", "is_kernels_available"):
        monkeypatch.setattr(module, package, lambda *_: True, raising=False)
    if method == "mxfp4":
        monkeypatch.setattr(module, "get_current_accelerator", lambda: torch.device("cuda"))
    asked = getattr(module, quantiser)(config(), pre_quantized=True)
    asked.validate_environment(device_map="cuda")
    assert unpacked_on(gpu_named(gpu), method) == asked.quantization_config.dequantize


@pytest.mark.parametrize(("gpu", "runs"), [("cpu", False), ("a100-80gb", False), ("h200", True)])
def test_weights_without_kernels_are_counted_plain_and_noted(gpu, runs):
    plain = planner.load_model({**TINY["llama"]})
    packed = planner.load_model({**TINY["llama"], "quantization_config": {"quant_method": "fp8"}})
    work, deploy = Inference(batch=1, prompt_tokens=4), Deployment(gpu=gpu)
    held = planner.estimate(packed, work, deploy)
    as_plain = planner.estimate(plain, work, deploy).memory.weights_bytes
    assert (held.memory.weights_bytes < as_plain) == runs
    assert any("dequantised on loading" in row.note for row in held.rows) != runs
    if not runs:
        assert held.memory.weights_bytes == as_plain
        assert held.model == replace(packed, quantization=None)
