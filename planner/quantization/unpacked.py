"""Checkpoints that transformers 5.23 dequantises on loading, where a device lacks the kernels.

quantizers/quantizer_finegrained_fp8.py: fp8 on what is neither cuda nor xpu, or before compute
capability 8.9.
quantizers/quantizer_mxfp4.py: MXFP4 on the same (a CPU: without use_kernels), or before 7.5; later
GPUs keep it packed with triton 3.4 and the `kernels` package, which we take to be there.
"""

from __future__ import annotations

from planner.catalog.gpus import Gpu

NEEDED_CAPABILITY = {"fp8": (8, 9), "mxfp4": (7, 5)}


def unpacked_on(gpu: Gpu, method: str) -> bool:
    """Whether transformers loads a checkpoint of this `quant_method` in the model's dtype."""
    needed = NEEDED_CAPABILITY.get(method)
    if needed is None:
        return False
    if gpu.vendor == "amd":  # to torch gfx90a, the oldest in the catalogue, is (9, 0)
        return False
    if gpu.vendor != "nvidia":  # neither cuda nor xpu
        return True
    assert gpu.compute_capability is not None
    major, minor = gpu.compute_capability.split(".")
    return (int(major), int(minor)) < needed
