"""What the server of isolated processes imports once: all that takes seconds, and no device.

A server that has touched CUDA could not be forked from: torch is told to look for devices through
NVML alone. Nothing is computed either, for the threads of a computation do not survive a fork; a
model on the meta device has transformers import whatever it imports late.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import pynvml
import torch

import profiles.worker  # noqa: F401

with contextlib.suppress(ImportError):
    import torch._dynamo  # torch.optim and checkpointing reach for it
    import torch.nn.attention.flex_attention
    from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig  # noqa: F401
    from transformers.models.gpt2 import modeling_gpt2  # noqa: F401

    SMALL: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 8,
    }
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            LlamaConfig(**SMALL, num_attention_heads=1)
        )


@contextlib.contextmanager
def capabilities_from_nvml() -> Iterator[None]:
    """torch.cuda.get_device_capability without CUDA: bitsandbytes asks for it when imported."""
    asked = torch.cuda.get_device_capability

    def capability(device: Any = 0) -> tuple[int, int]:
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(getattr(device, "idx", device)))
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        finally:
            pynvml.nvmlShutdown()
        return major, minor

    torch.cuda.get_device_capability = capability
    try:
        yield
    finally:
        torch.cuda.get_device_capability = asked


# peft imports much, bitsandbytes where it is installed, and not every version of it imports
with contextlib.suppress(Exception), capabilities_from_nvml():
    import peft  # noqa: F401
