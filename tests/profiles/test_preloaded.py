"""What is imported before a fork asks NVML for a GPU's capability, never CUDA."""

import sys

import pynvml
import pytest
import torch

from profiles.preloaded import capabilities_from_nvml


@pytest.fixture
def hopper(monkeypatch):
    """A machine with one GPU, seen by NVML alone."""
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCudaComputeCapability", lambda handle: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_bitsandbytes_finds_a_gpu_without_touching_it(hopper):
    pytest.importorskip("bitsandbytes")
    before = torch.cuda.get_device_capability
    with capabilities_from_nvml():
        specs = sys.modules["bitsandbytes.cuda_specs"].get_cuda_specs()
    assert specs.highest_compute_capability == (9, 0)
    assert not torch.cuda.is_initialized()
    assert torch.cuda.get_device_capability is before
