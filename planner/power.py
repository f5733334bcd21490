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

from planner.calibration import EnergyCost
from planner.op_families import ALIAS
from planner.program import Number

EXPONENT = 2.0
"""a: what switches takes the square of the voltage, which follows the clock. Nothing is fitted."""
LOWEST, HALVINGS = 0.3, 20


def flop_joules(cost: EnergyCost, dtype: str, clock: Number = None) -> Number:
    """Joules of a FLOP in this dtype at a clock; None: the one of a sustained product."""
    halved = 0.5 if ALIAS.get(dtype) == "fp8" else 1.0  # half the width, as the rate
    risen = 1.0 if clock is None else (np.asarray(clock) / cost.clock) ** EXPONENT
    return halved * cost.flop_j * risen


def capped_clock(
    seconds: Callable[[Number], Number],
    flops: Number,
    moved_bytes: Number,
    cost: EnergyCost | None,
    tdp_w: float | None,
    dtype: str,
) -> Number:
    """The highest clock at which a pass of `seconds(clock)` draws the TDP at most, by halving."""
    if cost is None or tdp_w is None:
        return 1.0
    watts = tdp_w - cost.idle_w

    def exceeds(clock: Number) -> Number:
        joules = flop_joules(cost, dtype, clock) * flops + cost.byte_j * moved_bytes
        return joules > watts * seconds(clock)

    over = np.asarray(exceeds(1.0))
    if not np.any(over):
        return 1.0
    low, high = np.full(over.shape, LOWEST), np.ones(over.shape)
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        above = exceeds(middle)
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.where(over, low, 1.0)[()]
