"""The clock of a GPU at its power cap, as a share of the one that short bursts run at.

    E(f) = e_flop · F · (f / f₀)ᵃ + e_byte · B ≤ (TDP − idle) · T(f)

Ops are timed in bursts too short for the cap: an H200 multiplies 8192³ in 1.37 ms at first and in
1.62 ms when it goes on for a second, so f₀ = 0.85 is the clock that its joules a FLOP were
measured at. The limiter holds a mean over many kernels: what streams bytes, or waits for the host,
leaves watts to the products beside it. A lower clock stretches what computes, T(f), and takes less
for each FLOP, as the voltage falls with it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from planner.program import Number
from planner.timing.calibration import EnergyCost
from planner.timing.op_families import ALIAS

EXPONENT = 2.0
"""a: what switches takes the square of the voltage, which follows the clock. Nothing is fitted."""
LOWEST, ROUNDS = 0.3, 16


def flop_joules(cost: EnergyCost, dtype: str, clock: Number = None) -> Number:
    """Joules of a FLOP in this dtype at a clock; None: the one of a sustained product."""
    halved = 0.5 if ALIAS.get(dtype) == "fp8" else 1.0  # half the width, as the rate
    flop_j, sustained = cost.of(dtype)
    risen = 1.0 if clock is None else (np.asarray(clock) / sustained) ** EXPONENT
    return halved * flop_j * risen


def capped_clock(
    seconds: Callable[[Number], Number],
    flops: Number,
    moved_bytes: Number,
    cost: EnergyCost | None,
    tdp_w: float | None,
    dtype: str,
) -> Number:
    """The highest clock at which a pass of `seconds(clock)` draws the TDP at most.

    By regula falsi, the end that stays halved in weight (Illinois; doi:10.1007/BF01934364).
    """
    if cost is None or tdp_w is None:
        return 1.0
    watts = tdp_w - cost.idle_w

    def excess_j(clock: Number) -> Number:
        joules = flop_joules(cost, dtype, clock) * flops + cost.byte_j * moved_bytes
        return np.asarray(joules - watts * seconds(clock), dtype=np.float64)

    above = excess_j(1.0)
    over = above > 0.0
    if not np.any(over):
        return 1.0
    low, high = np.full(above.shape, LOWEST), np.ones(above.shape)
    below = np.minimum(excess_j(low), 0.0)  # 0: not even the lowest clock is enough
    before: Number = None
    for _ in range(ROUNDS):
        width = np.where(above > below, above - below, 1.0)
        at = np.where(over, (low * above - high * below) / width, 1.0)
        found = excess_j(at)
        up = found > 0.0
        again = np.zeros_like(up) if before is None else up == before
        stayed = np.where(again, 0.5, 1.0)
        low, high = np.where(up, low, at), np.where(up, at, high)
        above, below = np.where(up, found, stayed * above), np.where(up, stayed * below, found)
        before = up
    return np.where(over, at, 1.0)[()]
