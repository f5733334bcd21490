"""What a process holds on a device besides its tensors: published constants with their sources."""

from __future__ import annotations

from collections.abc import Iterator

from planner.catalog.gpus import Gpu
from planner.ledger import Row

CONTEXT_BYTES = int(0.51 * 2**30)
"""A CUDA context before any tensor: 0.51 GiB in 42 of 42 single-GPU vLLM 0.19 start-up logs on
H100. Taken for every NVIDIA and AMD device until it is measured there; nothing is known of others,
and nothing is added for them."""

WITH_CONTEXT = ("nvidia", "amd")


def overhead_rows(gpu: Gpu, *, workspace: bool, trains: bool = False) -> Iterator[Row]:
    """The device context, and the workspace that cuBLAS has torch allocate."""
    if gpu.vendor not in WITH_CONTEXT:
        return

    def row(item: str, size: int, note: str) -> Row:
        return Row(
            component="overhead",
            item=item,
            count=1,
            formula="constant",
            values=(("constant", size),),
            size_bytes=size,
            note=note,
        )

    yield row(
        "device context", CONTEXT_BYTES, "42 vLLM 0.19 start-up logs on H100; not measured here"
    )
    if workspace:
        yield row(
            "cuBLAS workspace",
            workspace_bytes(gpu),
            "32 MiB from sm_90 on, 8.125 MiB before: torch 2.13, CublasHandlePool.cpp",
        )
        if trains:
            yield row(
                "cuBLAS workspace of the backward's thread",
                workspace_bytes(gpu),
                "a handle for each thread: torch 2.13, CublasHandlePool.cpp; not measured",
            )


def context_bytes(gpu: Gpu) -> int:
    """The device context, where anything is known of it."""
    return CONTEXT_BYTES if gpu.vendor in WITH_CONTEXT else 0


def workspace_bytes(gpu: Gpu) -> int:
    """The cuBLAS workspace that torch allocates at the first matrix product; none on a CPU."""
    if gpu.vendor not in WITH_CONTEXT:
        return 0
    try:
        hopper_or_later = float(gpu.compute_capability or 0) >= 9.0
    except ValueError:  # AMD's gfx names
        hopper_or_later = False
    return 32 * 2**20 if hopper_or_later else 8_519_680
