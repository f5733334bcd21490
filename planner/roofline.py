"""Op → seconds by the plain roofline: the larger of FLOPs over peak and bytes over bandwidth.

Uncalibrated: datasheet peaks, no launch or host cost, no reuse in caches. A floor, not a forecast.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.catalog.gpus import Gpu
from planner.program import Dims, Number, Op, Program, evaluate, maximum


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one pass computes and moves, and the time of its ops one after the other."""

    flops: Number
    moved_bytes: Number
    time_s: Number


def pass_cost(program: Program, dims: Dims, gpu: Gpu, *, dtype: str) -> Cost:
    """Sum over the ops of max(FLOPs / peak, bytes / bandwidth), over every cell of `dims`."""
    flops: Number = 0
    moved: Number = 0
    time_s: Number = 0.0
    peak, bandwidth = gpu.flops_per_s(dtype), gpu.memory_bandwidth_bytes_per_s
    walked: dict[int, tuple[Number, Number, Number]] = {}
    for segment in program.segments:
        key = id(segment.ops)
        if key not in walked:
            walked[key] = _walk(segment.ops, dims, peak, bandwidth)
        f, m, t = walked[key]
        flops = flops + segment.count * f
        moved = moved + segment.count * m
        time_s = time_s + segment.count * t
    return Cost(flops=flops, moved_bytes=moved, time_s=time_s)


def _walk(
    ops: tuple[Op, ...], dims: Dims, peak: float, bandwidth: float
) -> tuple[Number, Number, Number]:
    flops: Number = 0
    moved: Number = 0
    time_s: Number = 0.0
    for op in ops:
        f = 0 if op.flops is None else evaluate(op.flops, dims)
        m = op_bytes(op, dims)
        flops = flops + f
        moved = moved + m
        time_s = time_s + maximum(f / peak, m / bandwidth)
    return flops, moved, time_s


def op_bytes(op: Op, dims: Dims) -> Number:
    """Bytes an op reads and writes: its inputs, its weights, its outputs; nothing that only frees.

    A preallocated or inherited cache is not written by being there.
    """
    if not (op.reads or op.weight_bytes or op.moved or op.flops):
        return 0
    total: Number = op.weight_bytes
    for buffer in (*op.reads, *op.allocates):
        total = total + buffer.nbytes(dims)
    for shape in op.moved:
        total = total + evaluate(shape, dims)
    return total
