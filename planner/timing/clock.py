"""One op on the clock: by its family's fit, or by stated shares of the datasheet's ceilings.

No op is faster than FLOPs over peak, nor, for traffic beyond the L2 cache, than bytes over
bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.catalog.gpus import Gpu
from planner.program import Number, maximum
from planner.timing.calibration import TRANSFERRED, Calibration, calibration_of
from planner.timing.op_kinds import (
    Timed,
)
from planner.timing.op_times import Fit, Roof

DEFAULT = Roof(
    floor_s=3e-6, compute=0.7, bandwidth=0.75, extra_flops=0.0, extra_bytes=1e6, power=3.0
)
"""An op of a GPU that nobody measured: among those that were (catalog/calibration), bf16 products
are fitted with 0.61–0.91 of peak and 0.74–0.91 of bandwidth, from at most 4.2 µs on."""
DEFAULT_ERROR = 0.4
"""How far a time by `DEFAULT` is said to be off: stated, not fitted, and wide on purpose."""
NO_KERNEL_BYTES = 512.0
"""An op that runs a kernel is timed as one that moves as many at least."""
UNTIMED_ERROR = 0.8
"""The same of a whole pass on a device none of whose ops was timed, or by another CPU's: all its
ops err alike (docs/published.md: on MI300Xs by up to 47 %)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """How fast a device is taken to be: its ceilings, its calibration, what the runtime runs.

    `backends` are the attention kernels to look for, best first. `weight_ratio` is what stored
    weights of linear layers take of plain ones, `expert_ratio` those of routed experts;
    `product_dtype` what their products run in.
    """

    gpu: Gpu
    dtype: str
    calibration: Calibration | None
    backends: tuple[str, ...] = ()
    weight_ratio: float = 1.0
    expert_ratio: float = 1.0
    product_dtype: str = ""
    fused: bool = False
    gpus: int = 1
    uncalibrated_because: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpTime:
    """One kind of op of a pass: how often, its seconds once, and where the number comes from.

    `clocked_s`: the part that computing takes, which a lower clock stretches; `computed_flops`:
    with what a kernel computes behind a mask that hides it.
    """

    timed: Timed
    family: str
    seconds: Number
    clocked_s: Number
    computed_flops: Number
    flops: Number
    moved_bytes: Number
    error: float
    basis: str  # "interpolated" | "extrapolated" | "uncalibrated"

    def at(self, clock: Number) -> Number:
        """Seconds at a lower clock, which stretches what computes (power.py)."""
        return self.seconds + self.clocked_s * (1.0 / clock - 1.0)


def speed_of(
    gpu: Gpu,
    dtype: str,
    *,
    backends: tuple[str, ...] = (),
    fused: bool = False,
    weight_ratio: float = 1.0,
    expert_ratio: float = 1.0,
    product_dtype: str = "",
    gpus: int = 1,
) -> Speed:
    """A device with the calibration that there is for it.

    Of a CPU it goes for the dtypes that products were timed in: which of the others have
    instructions of their own differs from one to the next.
    """
    known, because = calibration_of(gpu), ""
    if gpu.is_cpu and known is not None and not known.times_products(dtype):
        known, because = None, f": no product was timed in {dtype} on a CPU"
    return Speed(
        gpu=gpu,
        dtype=dtype,
        calibration=known,
        uncalibrated_because=because,
        backends=backends,
        fused=fused,
        weight_ratio=weight_ratio,
        expert_ratio=expert_ratio,
        product_dtype=product_dtype or dtype,
        gpus=gpus,
    )


def covering(speed: Speed, family: str, dtype: str, sizes: tuple[Number, ...]) -> Fit | None:
    """The runtime's own fit where it covers the shape, else one that does, else its own."""
    calibration = speed.calibration
    if calibration is None:
        return None
    found = [
        calibration.fit(family, dtype, *backends) for backends in (speed.backends, (), ("vllm",))
    ]
    start = len(sizes) - 2
    inside = (fit for fit in found if fit is not None and fit.covers(sizes[start:], start))
    return next(inside, found[0])


def by_fit(
    timed: Timed,
    family: str,
    fit: Fit,
    seconds: Number,
    sizes: tuple[Number, ...],
    flops: Number,
    moved: Number,
    speed: Speed,
) -> OpTime:
    """By what was measured of its family: within its sizes, or beyond them."""
    measured = not fit.source.startswith(TRANSFERRED)
    inside = measured and fit.covers(sizes)
    off = 0.25 if fit.held_out is None else fit.held_out.p90
    if not inside:
        off = max(2 * off, 0.25)
    seconds = maximum(seconds, floor_s(flops, moved, speed))
    return OpTime(
        timed=timed,
        family=family,
        seconds=seconds,
        clocked_s=np.minimum(seconds, computing_s(fit, flops)),
        computed_flops=flops,
        flops=flops,
        moved_bytes=moved,
        error=off,
        basis="interpolated" if inside else "extrapolated",
    )


def computing_s(fit: Fit, flops: Number) -> Number:
    """What the FLOPs take at the rate that the fit's large ops reach."""
    return flops / (fit.peak_flops_per_s * fit.roof.compute)


def by_default(
    timed: Timed, family: str, dtype: str, flops: Number, moved: Number, speed: Speed
) -> OpTime:
    """By `DEFAULT`: nobody timed such an op."""
    peak, bandwidth = speed.gpu.flops_per_s(dtype), speed.gpu.memory_bandwidth_bytes_per_s
    return OpTime(
        timed=timed,
        family=family,
        seconds=DEFAULT.seconds(flops, moved, peak, bandwidth),
        clocked_s=flops / (peak * DEFAULT.compute),
        computed_flops=flops,
        flops=flops,
        moved_bytes=moved,
        error=DEFAULT_ERROR,
        basis="uncalibrated",
    )


def floor_s(flops: Number, moved: Number, speed: Speed) -> Number:
    """FLOPs over peak, and bytes over bandwidth where an op moves more than the L2 cache holds.

    Of a CPU the catalogue knows neither: what was measured of it is in its fits.
    """
    if speed.gpu.is_cpu:
        return 0.0
    streamed = moved * (np.asarray(moved) > (speed.gpu.l2_bytes or 0))
    return maximum(
        flops / speed.gpu.flops_per_s(speed.product_dtype or speed.dtype),
        streamed / speed.gpu.memory_bandwidth_bytes_per_s,
    )
