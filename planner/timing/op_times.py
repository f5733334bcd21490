"""Seconds of an op: a smooth roofline times a residual that measured ops have left.

    T = (t₀ + ((F/(P·e_P))^p + (B/(W·e_W))^p)^(1/p)) · exp(r(log₂ sizes))

F + f₀ and B + b₀ stand for F and B: a kernel that computes or moves little reaches neither ceiling,
so that bandwidth depends on size. r is the mean of a Gaussian process over the logarithms of the
sizes (Rasmussen & Williams, eq. 2.25; Matérn 5/2, eq. 4.17), held at its edge outside what was
measured. Time is not monotone in a size (tile edges), and r does not make it so. No time is below
F/P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.program import Number
from planner.timing.op_families import FAMILIES, Family

Array = NDArray[np.float64]
STEPS_AN_OCTAVE = 4
"""Of the grid on which a residual is laid out once for an op whose other sizes are fixed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Roof:
    """The six numbers of the roofline; `compute` and `bandwidth` are shares of the datasheet's."""

    floor_s: float
    compute: float
    bandwidth: float
    extra_flops: float
    extra_bytes: float
    power: float

    def seconds(self, flops: Number, moved: Number, peak: float, bandwidth: float) -> Number:
        """t₀ and the smooth maximum of both ceilings."""
        computing = (flops + self.extra_flops) / (peak * self.compute)
        moving = (moved + self.extra_bytes) / (bandwidth * self.bandwidth)
        p = self.power
        larger = np.maximum(np.maximum(computing, moving), 1e-30)  # no power under- or overflows
        both: Number = larger * ((computing / larger) ** p + (moving / larger) ** p) ** (1 / p)
        return self.floor_s + both


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """|predicted/measured − 1| over ops whose shapes the fit never saw."""

    count: int
    median: float
    p90: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Fit:
    """One family in one dtype on one device.

    `points` are log₂ of the sizes that the residual was fitted on, `weights` what each contributes.
    `peak_flops_per_s` and `bandwidth_bytes_per_s` are what the shares of `roof` are of.
    """

    family: Family
    dtype: str
    roof: Roof
    peak_flops_per_s: float
    bandwidth_bytes_per_s: float
    points: Array
    weights: Array
    held_out: Errors | None
    source: str

    @property
    def low(self) -> Array:
        """The smallest of each size that was measured, log₂."""
        made: Array = self.points.min(axis=0)
        return made

    @property
    def high(self) -> Array:
        """The largest."""
        made: Array = self.points.max(axis=0)
        return made

    def residual(self, logs: Array) -> Array:
        """r at rows of log₂ sizes."""
        at = np.clip(logs, self.low, self.high)
        made: Array = matern(at, self.points, np.array(self.family.scales)) @ self.weights
        return made

    def roof_seconds(self, sizes: Sequence[Number]) -> Number:
        """The roofline alone."""
        flops, moved = self.family.work(*sizes, self.dtype)
        return self.roof.seconds(flops, moved, self.peak_flops_per_s, self.bandwidth_bytes_per_s)

    def seconds(self, sizes: Sequence[Number], free: tuple[int, ...] | None = None) -> Number:
        """The time at these sizes. Those that are `free` may be arrays; None: the family's."""
        flops, _ = self.family.work(*sizes, self.dtype)
        axes = self.family.free if free is None else free
        rest = tuple(_fixed(size) for i, size in enumerate(sizes) if i not in axes)
        if len(axes) == 1:
            residual = _along(self, rest, axes[0], _octaves(sizes[axes[0]]))
        else:
            residual = _across(self, rest, _octaves(sizes[0]), _octaves(sizes[1]))
        time_s = self.roof_seconds(sizes) * np.exp(residual)
        return np.maximum(time_s, flops / self.peak_flops_per_s)

    def seconds_at(self, sizes: Sequence[Number]) -> Number:
        """The same where any size may be an array: the residual without a table."""
        flops, _ = self.family.work(*sizes, self.dtype)
        rows = np.broadcast_arrays(*(_octaves(size) for size in sizes))
        residual = self.residual(np.stack([row.ravel() for row in rows], axis=1))
        time_s = self.roof_seconds(sizes) * np.exp(residual.reshape(rows[0].shape))[()]
        return np.maximum(time_s, flops / self.peak_flops_per_s)

    def covers(self, sizes: Sequence[Number], start: int = 0) -> bool:
        """Whether all of these sizes, from the `start`-th on, lie within those measured."""
        return bool(np.all(self.inside(sizes, start)))

    def inside(self, sizes: Sequence[Number], start: int = 0) -> Number:
        """Which of them do, where some are arrays. A quarter of an octave beyond still counts."""
        low, high = self.low - 0.25, self.high + 0.25
        found: Number = np.bool_(True)
        for i, size in enumerate(sizes, start=start):
            at = np.log2(np.maximum(size, 1.0))
            found = found & (at >= low[i]) & (at <= high[i])
        return found


def matern(a: Array, b: Array, scales: Array) -> Array:
    """(1 + √5 d + 5 d²/3)·exp(−√5 d), d the distance in units of the scales; [rows of a, of b]."""
    x, y = a / scales, b / scales
    square = (x * x).sum(-1)[:, None] + (y * y).sum(-1)[None] - 2.0 * x @ y.T
    s = np.sqrt(5.0 * np.maximum(square, 0.0))
    made: Array = (1.0 + s + s * s / 3.0) * np.exp(-s)
    return made


def _octaves(size: Number) -> Number:
    return np.log2(np.maximum(np.asarray(size, dtype=np.float64), 1.0))


def _fixed(size: Number) -> float:
    return float(np.log2(max(float(np.ravel(size)[0]), 1.0)))


def _along(fit: Fit, rest: tuple[float, ...], axis: int, at: Number) -> Number:
    start, table = _line(fit, rest, axis)
    place = np.arange(len(table)) / STEPS_AN_OCTAVE + start
    return np.interp(at, place, table)


def _across(fit: Fit, rest: tuple[float, ...], first: Number, second: Number) -> Number:
    starts, table = _plane(fit, rest)
    i, u = _place(first, starts[0], table.shape[0])
    j, v = _place(second, starts[1], table.shape[1])
    low = table[i, j] * (1 - v) + table[i, j + 1] * v
    high = table[i + 1, j] * (1 - v) + table[i + 1, j + 1] * v
    return low * (1 - u) + high * u


def _place(at: Number, start: float, length: int) -> tuple[Any, Any]:
    """The cell of a grid and how far into it, held at the edges."""
    x = np.clip((at - start) * STEPS_AN_OCTAVE, 0.0, length - 1.0)
    i = np.minimum(x.astype(np.int64) if isinstance(x, np.ndarray) else int(x), length - 2)
    return i, x - i


def _grid(low: float, high: float) -> tuple[float, Array]:
    start = np.floor(low * STEPS_AN_OCTAVE) / STEPS_AN_OCTAVE
    steps = max(2, int(np.ceil((high - start) * STEPS_AN_OCTAVE)) + 1)
    return float(start), start + np.arange(steps) / STEPS_AN_OCTAVE


@lru_cache(maxsize=4096)
def _line(fit: Fit, rest: tuple[float, ...], axis: int) -> tuple[float, Array]:
    start, places = _grid(float(fit.low[axis]), float(fit.high[axis]))
    columns = [np.full(len(places), value) for value in rest]
    columns.insert(axis, places)
    return start, fit.residual(np.stack(columns, axis=1))


@lru_cache(maxsize=1024)
def _plane(fit: Fit, rest: tuple[float, ...]) -> tuple[tuple[float, float], Array]:
    one, first = _grid(float(fit.low[0]), float(fit.high[0]))
    two, second = _grid(float(fit.low[1]), float(fit.high[1]))
    a, b = np.meshgrid(first, second, indexing="ij")
    columns = [a.ravel(), b.ravel(), *(np.full(a.size, value) for value in rest)]
    return (one, two), fit.residual(np.stack(columns, axis=1)).reshape(a.shape)


def family_named(name: str) -> Family:
    """The family that a fit is of."""
    return FAMILIES[name]
