"""Fits a family's roofline and its residual to measured ops, with numpy alone.

First the six numbers of the roofline by Levenberg–Marquardt on log times, with a loss that grows
slowly beyond 15 % (pseudo-Huber), so that kernels of another kind do not bend it. Then a Gaussian
process on what is left: weights (K + σ²)⁻¹ r, Rasmussen & Williams, algorithm 2.1, whose noise is
picked by leaving each point out in turn (eq. 5.12). Only calibration shapes are seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from planner.timing.op_families import Family
from planner.timing.op_times import Errors, Fit, Roof, matern

Array = NDArray[np.float64]
NOISES = (0.01, 0.03, 0.1, 0.3)
"""Variances of the noise that are tried, in units of the residual's own."""
LOSS_SCALE = 0.15
START = Roof(floor_s=2e-6, compute=0.75, bandwidth=0.8, extra_flops=5e7, extra_bytes=1e6, power=2.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Measured ops of one family: sizes a row, seconds, and which rows no fit may see."""

    sizes: Array
    seconds: Array
    held_out: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.seconds)

    def of(self, rows: NDArray[np.intp] | NDArray[np.bool_]) -> Samples:
        """Some rows."""
        return Samples(
            sizes=self.sizes[rows], seconds=self.seconds[rows], held_out=self.held_out[rows]
        )


def fit_family(
    family: Family,
    dtype: str,
    samples: Samples,
    *,
    peak: float,
    bandwidth: float,
    source: str,
    points: int,
) -> Fit:
    """The fit over at most `points` calibration rows, and its errors over the held-out ones."""
    seen = samples.of(~samples.held_out)
    chosen = seen.of(spread(np.log2(seen.sizes) / np.array(family.scales), points))
    roof = _fit_roof(family, dtype, chosen, peak, bandwidth)
    logs = np.log2(chosen.sizes)
    blank = Fit(
        family=family,
        dtype=dtype,
        roof=roof,
        peak_flops_per_s=peak,
        bandwidth_bytes_per_s=bandwidth,
        points=np.asarray(np.round(logs, 3), dtype=np.float64),
        weights=np.zeros(len(logs)),
        held_out=None,
        source=source,
    )
    left = np.log(chosen.seconds) - np.log(_roof_seconds(blank, chosen.sizes))
    blank = replace(blank, weights=_weights(blank.points, left, np.array(family.scales)))
    return replace(blank, held_out=errors(blank, samples.of(samples.held_out)))


def errors(fit: Fit, samples: Samples) -> Errors | None:
    """|predicted/measured − 1| of these rows: median and 90th percentile; None of none."""
    if not len(samples):
        return None
    off = np.abs(predicted(fit, samples.sizes) / samples.seconds - 1.0)
    return Errors(
        count=len(samples),
        median=round(float(np.median(off)), 5),
        p90=round(float(np.quantile(off, 0.9)), 5),
    )


def predicted(fit: Fit, sizes: Array) -> Array:
    """Times of many ops whose sizes all differ: the residual itself, without a table."""
    made: Array = _roof_seconds(fit, sizes) * np.exp(fit.residual(np.log2(sizes)))
    flops, _ = fit.family.work(*sizes.T, fit.dtype)
    bounded: Array = np.maximum(made, flops / fit.peak_flops_per_s)
    return bounded


def spread(places: Array, count: int) -> NDArray[np.intp]:
    """`count` rows far from one another: each next one is the farthest from all before.

    Gonzalez' farthest-point rule (doi:10.1016/0304-3975(85)90224-5), from the row nearest the mean.
    """
    if len(places) <= count:
        return np.arange(len(places))
    first = int(((places - places.mean(axis=0)) ** 2).sum(axis=1).argmin())
    chosen = [first]
    distance = ((places - places[first]) ** 2).sum(axis=1)
    while len(chosen) < count:
        farthest = int(distance.argmax())
        if distance[farthest] == 0.0:
            break
        chosen.append(farthest)
        distance = np.minimum(distance, ((places - places[farthest]) ** 2).sum(axis=1))
    return np.array(chosen)


def _roof_seconds(fit: Fit, sizes: Array) -> Array:
    made: Array = fit.roof_seconds(tuple(sizes.T))
    return made


def _fit_roof(family: Family, dtype: str, samples: Samples, peak: float, bandwidth: float) -> Roof:
    flops, moved = family.work(*samples.sizes.T, dtype)
    wanted = np.log(samples.seconds)
    computes = bool(np.max(flops) > 0)

    def roof(x: Array) -> Roof:
        floor, compute, width, extra_flops, extra_bytes, power = np.exp(x)
        return Roof(
            floor_s=floor,
            compute=min(compute, 1.0) if computes else 1.0,
            bandwidth=min(width, 1.5),  # what lies in a cache is faster than memory
            extra_flops=extra_flops if computes else 0.0,
            extra_bytes=extra_bytes,
            power=min(max(power, 1.0), 12.0),
        )

    def off(x: Array) -> Array:
        r = np.log(roof(x).seconds(flops, moved, peak, bandwidth)) - wanted
        s = LOSS_SCALE
        made: Array = np.sign(r) * np.sqrt(2.0 * s * s * (np.sqrt(1.0 + (r / s) ** 2) - 1.0))
        return made

    start = [getattr(START, name) for name in Roof.__dataclass_fields__]
    start[0] = float(samples.seconds.min()) / 2
    fitted = roof(levenberg_marquardt(off, np.log(np.array(start))))
    return Roof(**{n: float(f"{getattr(fitted, n):.5g}") for n in Roof.__dataclass_fields__})


def levenberg_marquardt(off: Callable[[Array], Array], x: Array, *, rounds: int = 80) -> Array:
    """The x that makes the sum of squares least (Marquardt, doi:10.1137/0111030).

    A weak pull to the start keeps numbers that the data do not tell apart where they were.
    """
    start, pull, step, damping = x, 0.02, 1e-5, 1e-2

    def all_off(x: Array) -> Array:
        return np.concatenate((off(x), pull * (x - start)))

    r = all_off(x)
    cost = float(r @ r)
    for _ in range(rounds):
        slope = np.stack([(all_off(x + step * e) - r) / step for e in np.eye(len(x))], axis=1)
        normal, gradient = slope.T @ slope, slope.T @ r
        for _ in range(10):
            change = -np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), gradient)
            change = np.clip(change, -1.0, 1.0)
            there = all_off(x + change)
            better = float(there @ there)
            if better < cost:
                break
            damping *= 4.0
        else:
            return x
        done = cost - better < 1e-8 * cost
        x, r, cost, damping = x + change, there, better, damping / 4.0
        if done:
            return x
    return x


def _weights(points: Array, left: Array, scales: Array) -> Array:
    """(K + σ²)⁻¹ r with the noise whose left-out errors are least in the mean."""
    covariance = matern(points, points, scales)
    best: tuple[float, Array] | None = None
    for noise in NOISES:
        inverse = np.linalg.inv(covariance + noise * np.eye(len(points)))
        weights = inverse @ left
        missed = float(np.mean(np.abs(weights / np.diag(inverse))))
        if best is None or missed < best[0]:
            best = (missed, weights)
    assert best is not None
    return np.array([float(f"{w:.4g}") for w in best[1]])
