from __future__ import annotations

import pytest

import planner
from planner.catalog.gpus import gpu_of_torch_name


@pytest.mark.parametrize("name", planner.gpus())
def test_every_device_has_its_figures_and_their_sources(name):
    gpu = planner.gpu_named(name)
    sources = dict(gpu.sources)
    assert gpu.memory_bytes > 2**30
    assert gpu.memory_bandwidth_bytes_per_s > 1e10
    assert gpu.flops_per_s("bf16") >= gpu.flops_per_s("fp32") > 0
    assert "dense_flops_per_s" in sources
    if not gpu.is_cpu:
        assert {"memory_bytes", "datasheet"} <= set(sources)
        # Google publishes no figure; Apple's are for the whole machine
        assert gpu.tdp_w is not None or gpu.vendor in ("google", "apple")


def test_an_h100_has_the_memory_that_torch_prints():
    """'GPU 0 has a total capacity of 79.19 GiB', as torch's out-of-memory message says."""
    assert round(planner.gpu_named("h100-80gb").memory_bytes / 2**30, 2) == 79.19


def test_torch_names_lead_back_to_the_catalogue():
    assert gpu_of_torch_name("NVIDIA H200") == "h200"
    assert gpu_of_torch_name("NVIDIA Imaginary 1") is None


@pytest.mark.parametrize("name", planner.catalogue())
def test_every_catalogue_model_can_be_planned(name):
    model = planner.load_model(name)
    work = planner.Inference(batch=1, prompt_tokens=64, output_tokens=8)
    for runtime in ("transformers", "vllm"):
        deploy = planner.Deployment(gpu="h200", runtime=runtime)
        if (name, runtime) == ("bamba-9b", "vllm"):
            with pytest.raises(planner.ConfigError, match="does not plan Mamba-2 layers"):
                planner.estimate(model, work, deploy)
            continue
        assert planner.estimate(model, work, deploy).memory.total_bytes > 0


def test_the_catalogue_has_many_devices_and_models():
    assert len(planner.gpus()) >= 36
    assert len(planner.catalogue()) >= 60
