"""Ops that compute next to nothing: how torch's kernels walk decides how fast they move bytes."""

from __future__ import annotations

import re

import numpy as np

from planner.program import Dims, Number, Op
from planner.timing.clock import NO_KERNEL_BYTES, OpTime, Speed, by_default, by_fit
from planner.timing.op_families import (
    ELEMENT_BYTES,
    ELEMENTWISE_TANH,
    NORM_RMS,
    STRIDED,
    STRIDED_CAST,
)
from planner.timing.op_kinds import (
    Bytes,
    Timed,
    elements,
)
from planner.timing.op_times import Fit


def bytes_time(timed: Timed, kind: Bytes, dims: Dims, speed: Speed, moved: Number) -> OpTime:
    """An op that computes next to nothing."""
    op, known = timed.op, speed.calibration
    name = _on_cpu(op, kind.kind, speed) if speed.gpu.is_cpu else kind.kind
    fit = None if known is None else known.fit(name) or known.fit(name.split()[0])
    if fit is None:
        return by_default(timed, kind.kind, speed.dtype, 0.0, moved, speed)
    size = np.maximum(moved, NO_KERNEL_BYTES)
    seconds = byte_seconds(name, size, elements(op, dims) * 1.0, speed)
    if op.sometimes:
        seconds = seconds * (np.asarray(moved) > 0)
    return by_fit(timed, kind.kind, fit, seconds, (size,), 0.0, moved, speed)


CPU_PLAIN = (STRIDED, STRIDED_CAST, "cast", "cat")
"""Kinds that a CPU runs as plain ones: its loops go along rows, by vectors, whether these lie one
behind the other or not (aten/src/ATen/native/cpu/Loops.h, CatKernel.cpp)."""
TANH = re.compile(r"tanh|gelu|erf")
"""What a CPU computes for longer than it moves; a GPU hides it."""


def _on_cpu(op: Op, kind: str, speed: Speed) -> str:
    """Which fit times an op that moves bytes on a CPU."""
    known = speed.calibration
    if known is None:
        return kind
    if kind == "elementwise" and TANH.search(op.kernel) and ELEMENTWISE_TANH in known.fits:
        return ELEMENTWISE_TANH
    if kind == "norm" and "rms_norm" in op.kernel and NORM_RMS in known.fits:
        return NORM_RMS
    return "elementwise" if kind in CPU_PLAIN and known.fit(kind.split()[0]) is None else kind


def byte_seconds(kind: str, moved: Number, count: Number, speed: Speed) -> Number:
    """Seconds of an op that moves bytes and makes `count` elements.

    A strided one takes as long for an element of two bytes as for a wider one, until the bandwidth
    is full. So does one that is strided and converts; where nobody timed it, it takes what both add
    to a plain one.
    """
    assert speed.calibration is not None
    cold = speed.calibration.fit(kind)
    if kind == STRIDED_CAST and cold is None:
        plain = byte_seconds("elementwise", moved, count, speed)
        both = (byte_seconds(one, moved, count, speed) for one in (STRIDED, "cast"))
        return sum(both) - plain
    if kind == STRIDED and cold is None:  # of a CPU
        return byte_seconds("elementwise", moved, count, speed)
    assert cold is not None
    if kind in (STRIDED, STRIDED_CAST):
        by_element = cold.seconds((np.maximum(ELEMENT_BYTES * count, NO_KERNEL_BYTES),))
        return np.maximum(by_element, byte_seconds("elementwise", moved, count, speed))
    return _warm_or_cold(kind, cold, moved, speed)


def _warm_or_cold(kind: str, cold: Fit, moved: Number, speed: Speed) -> Number:
    """What the op before has written still lies in the cache, where all of it fits."""
    assert speed.calibration is not None
    warm = speed.calibration.fits.get(f"{kind}:warm")
    if warm is None:
        return cold.seconds((moved,))
    fits = np.asarray(moved) <= (speed.gpu.l2_bytes or 0)
    return np.where(fits, warm.seconds((moved,)), cold.seconds((moved,)))
