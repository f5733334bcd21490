"""Joules of a pass: idle power while it lasts, and joules of its FLOPs and bytes; TDP at the most.

Measured where a calibration has them (a product, a copy and idling, each run for more than a
second). Elsewhere shares of the TDP that were measured on an H200 stand in.
"""

from __future__ import annotations

import numpy as np

from planner.catalog.gpus import Gpu
from planner.program import Number
from planner.timing.calibration import Calibration, EnergyCost
from planner.timing.power import flop_joules

IDLE_SHARE = 0.23
"""Power at idle clocks held high, of the TDP: 164 of 700 W (H200, microbench `sustained idle`)."""
PRODUCT_SHARE, PRODUCT_SPEED = 0.77, 0.69
"""What a sustained product adds to it, at this share of peak FLOP/s (H200: 701 W, 679 TFLOP/s)."""
STREAM_SHARE, STREAM_SPEED = 0.43, 0.56
"""What a sustained copy adds, at this share of bandwidth (H200: 465 W, 2.7 TB/s)."""


def pass_joules(
    flops: Number,
    moved_bytes: Number,
    time_s: Number,
    gpu: Gpu,
    *,
    dtype: str,
    calibration: Calibration | None,
    clock: Number = None,
    most_w: float | None = None,
) -> Number | None:
    """Energy of one GPU over a pass; None where the catalogue has no TDP.

    `clock`: the share of a burst's that it ran at (power.py). `most_w`: what it is held to; None:
    its TDP.
    """
    if gpu.tdp_w is None:
        return None
    cost = None if calibration is None else calibration.energy
    if cost is None:
        cost = by_tdp(gpu, dtype)
        computed = cost.flop_j * flops
    else:
        computed = flop_joules(cost, dtype, clock) * flops
    spent = cost.idle_w * time_s + computed + cost.byte_j * moved_bytes
    return np.minimum(spent, (most_w or gpu.tdp_w) * time_s)


def by_tdp(gpu: Gpu, dtype: str) -> EnergyCost:
    """Shares of the TDP at the datasheet's ceilings."""
    tdp = gpu.tdp_w or 0.0
    return EnergyCost(
        idle_w=IDLE_SHARE * tdp,
        flop_j=PRODUCT_SHARE * tdp / (PRODUCT_SPEED * gpu.flops_per_s(dtype)),
        byte_j=STREAM_SHARE * tdp / (STREAM_SPEED * gpu.memory_bandwidth_bytes_per_s),
        source="shares of the TDP",
    )
