"""What a process holds on a device besides its tensors: measured, or published elsewhere.

The driver's context, and the kernels that libraries load with their first use: an H200's figures
are those of profiles/data/overheads/h200.jsonl (`python -m profiles.overheads`), in gpus.toml.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from planner.autograd.fused_attention import fused_kernel
from planner.catalog.gpus import Gpu, gpu_named
from planner.dtypes import element_bytes
from planner.ledger import Row, constant_row

CONTEXT_BYTES = int(0.51 * 2**30)
"""A CUDA context before any tensor: 0.51 GiB in 42 of 42 single-GPU vLLM 0.19 start-up logs on
H100 (CUDA 12.8). Taken for every NVIDIA and AMD device on which it was not measured; nothing is
known of others, and nothing is added for them."""
PUBLISHED = "42 vLLM 0.19 start-up logs on H100; not measured here"

MEASURED = "h200"
"""The device on which it was measured what libraries load: taken for every NVIDIA device."""

WITH_CONTEXT = ("nvidia", "amd")
WORKSPACE = "cuBLAS workspace"


def overhead_rows(
    gpu: Gpu, *, attention: str | None, dtype: str = "bf16", trains: bool = False
) -> Iterator[Row]:
    """The device context; of a program on torch, whose `attention` it is, libraries and workspaces.

    None: not on torch, or with rules of its own for these.
    """
    if gpu.vendor not in WITH_CONTEXT:
        return
    own = dict(gpu.process_bytes)
    context, note = own.get("context", CONTEXT_BYTES), "measured" if own else PUBLISHED
    yield constant_row("device context", context, note)
    if attention is None:
        return
    if gpu.vendor == "nvidia":
        loaded = own or dict(gpu_named(MEASURED).process_bytes)
        where = "measured" if own else f"as on {gpu_named(MEASURED).label}; not measured here"
        for name, item in _libraries(gpu, attention, dtype, trains=trains):
            yield constant_row(item, loaded[name], where)
    source = "32 MiB from sm_90 on, 8.125 MiB before: torch 2.13, CublasHandlePool.cpp"
    yield constant_row(WORKSPACE, workspace_bytes(gpu), source)
    if trains:
        yield constant_row(
            f"{WORKSPACE} of the backward's thread",
            workspace_bytes(gpu),
            "a handle for each thread: torch 2.13, CublasHandlePool.cpp; seen on an H200",
        )


def outside_torch_bytes(rows: Iterable[Row]) -> int:
    """What of the overhead torch's allocator does not hold."""
    return sum(
        row.size_bytes
        for row in rows
        if row.component == "overhead" and not row.item.startswith(WORKSPACE)
    )


def workspace_bytes(gpu: Gpu) -> int:
    """The cuBLAS workspace that torch allocates at the first matrix product; none on a CPU."""
    if gpu.vendor not in WITH_CONTEXT:
        return 0
    try:
        hopper_or_later = float(gpu.compute_capability or 0) >= 9.0
    except ValueError:  # AMD's gfx names
        hopper_or_later = False
    return 32 * 2**20 if hopper_or_later else 8_519_680


def _libraries(gpu: Gpu, attention: str, dtype: str, *, trains: bool) -> Iterator[tuple[str, str]]:
    """Names in gpus.toml of what is loaded, and what to call it."""
    yield "products", "kernels of cuBLAS"
    yield "passes", "kernels of torch's other ops"
    kernel = fused_kernel("cuda", gpu.compute_capability, element_bytes(dtype))
    cudnn = kernel == "cudnn" and attention.startswith("sdpa")
    if cudnn:
        yield "cudnn_attention", "kernels of cuDNN's attention"
    if trains:
        yield "backward", "cuBLAS of the backward's thread"
        if cudnn:
            yield "cudnn_attention_backward", "kernels of cuDNN's attention, backward"
