"""How fast a deployment runs: which kernels its runtime takes, what its GPUs say to one another."""

from __future__ import annotations

from functools import lru_cache

from planner.catalog.gpus import Gpu
from planner.dtypes import element_bytes
from planner.model import Model
from planner.program import Dims, Number
from planner.quantization.base import linears
from planner.runtimes.base import Setting
from planner.timing.clock import Speed, speed_of
from planner.timing.collectives import DEFAULT_HOP_S, collective_seconds, link_bytes_per_s
from planner.timing.roofline import Cost

BACKENDS = {
    "transformers": ("cudnn", "flash", "default", "vllm"),
    "attnlab": ("cudnn", "flash", "default", "vllm"),
    "vllm": ("vllm", "flash", "cudnn", "default"),
    "llama.cpp": ("flash", "vllm", "cudnn", "default"),
}
"""Attention kernels that a runtime takes, best first: torch 2.11's sdpa takes cuDNN's on Hopper."""
WIDE_BACKENDS = {"fp32": ("efficient",)}
"""Flash and cuDNN's kernels take 2-byte elements alone (aten/src/ATen/native/transformers/cuda/
sdp_utils.cpp: check_tensor_dtype)."""
CPU_BACKENDS = ("flash", "default")
"""A CPU's own flash kernel takes all dtypes (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp)."""
FP8_METHODS = frozenset(("fp8", "fbgemm_fp8", "compressed-tensors"))


def speed_for(model: Model, setting: Setting, runtime: str, gpu: Gpu) -> Speed:
    """The device, its calibration, and what runtime and weights make of it."""
    has_fp8 = "fp8" in dict(gpu.dense_flops_per_s)
    ratio, expert_ratio, product_dtype = _stored(model, setting.dtype, has_fp8)
    return speed_of(
        gpu,
        setting.dtype,
        backends=CPU_BACKENDS
        if gpu.is_cpu
        else (*WIDE_BACKENDS.get(setting.dtype, ()), *BACKENDS.get(runtime, ())),
        fused=runtime == "attnlab" and setting.mode == "graph",
        weight_ratio=ratio,
        expert_ratio=expert_ratio,
        product_dtype=product_dtype,
        gpus=setting.tensor_parallel,
    )


@lru_cache(maxsize=256)
def _stored(model: Model, dtype: str, has_fp8: bool) -> tuple[float, float, str]:
    """What stored weights take of plain ones, of linear layers and of experts; products' dtype.

    `has_fp8`: the device multiplies in fp8.
    """
    if model.quantization is None:
        return 1.0, 1.0, dtype
    plain, stored = {True: 0, False: 0}, {True: 0, False: 0}  # by whether they are experts'
    for parameter, tensor in model.stored_tensors(dtype):
        if not linears(parameter) or parameter.group in ("embedding", "head"):
            continue
        experts = parameter.group == "experts"
        stored[experts] += tensor.size_bytes
        plain[experts] += 0 if tensor.role != "weight" else parameter.count * element_bytes(dtype)

    def ratio(*kinds: bool) -> float:
        whole = sum(plain[kind] for kind in kinds)
        return min(1.0, sum(stored[kind] for kind in kinds) / whole) if whole else 1.0

    fp8_weights = model.quantization.method in FP8_METHODS and 0.4 < ratio(True, False) < 0.6
    in_fp8 = has_fp8 and fp8_weights
    return ratio(False), ratio(True), "fp8" if in_fp8 else dtype


def communication_cost(
    model: Model, setting: Setting, dims: Dims, speed: Speed, *, gathers_logits: bool
) -> Cost:
    """All-reduces of a tensor-parallel pass, and what pipeline stages hand on.

    Two a layer of [B · T, h] (Megatron-LM, arXiv:1909.08053, §3), one of the embedding; where every
    GPU has a part of the vocabulary, the last logits of all sequences are gathered (vLLM,
    model_executor/layers/logits_processor.py: tensor_model_parallel_all_gather).
    """
    elements = dims.batch * dims.tokens * float(model.hidden_size)
    size = elements * element_bytes(setting.dtype)
    seconds: Number = 0.0 * size
    off: Number = 0.0 * size
    if setting.tensor_parallel > 1:
        times = 2 * len(model.layers) + 1
        nccl = ":nccl" if speed.fused else ""  # a compiled model calls NCCL, vLLM its own
        one, error = collective_seconds("all_reduce", size, setting.tensor_parallel, speed, nccl)
        seconds, off = times * one, times * one * error
        if gathers_logits:
            logits = dims.batch * float(model.vocab_size) * element_bytes(setting.dtype)
            one, error = collective_seconds("all_gather", logits, setting.tensor_parallel, speed)
            seconds, off = seconds + one, off + one * error
    stages = setting.pipeline_parallel - 1
    if stages:
        seconds = seconds + stages * (DEFAULT_HOP_S + size / link_bytes_per_s(speed.gpu))
        off = off + 0.5 * seconds
    return Cost(
        flops=0.0,
        moved_bytes=0.0,
        time_s=seconds,
        by_family_s={"communication": seconds},
        error_s=off,
    )
