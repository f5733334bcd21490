"""Ops that compute next to nothing: how torch's kernels walk decides how fast they move bytes."""

from __future__ import annotations

import re

import numpy as np

from planner.program import Dims, Number, Op, evaluate
from planner.timing.calibration import Calibration
from planner.timing.clock import NO_KERNEL_BYTES, OpTime, Speed, by_default, by_fit
from planner.timing.op_families import (
    ACROSS,
    CUMSUM_DOWN,
    ELEMENT_BYTES,
    ELEMENTWISE_TANH,
    FAR,
    JOINED,
    NORM_RMS,
    OFFSETS,
    OFFSETS_CAST,
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
    name = (_on_cpu if speed.gpu.is_cpu else _on_gpu)(op, kind.kind, speed)
    fit = None if known is None else _fit_of(name, known)
    if fit is None:
        return by_default(timed, kind.kind, speed.dtype, 0.0, moved, speed)
    size = np.maximum(moved, NO_KERNEL_BYTES)
    second = _second(op, name, dims)
    seconds = byte_seconds(name, size, elements(op, dims) * 1.0, speed, second)
    if op.sometimes:
        seconds = seconds * (np.asarray(moved) > 0)
    sizes = _sizes(fit, size, elements(op, dims) * 1.0, second)
    return by_fit(timed, kind.kind, fit, seconds, sizes, 0.0, moved, speed)


INSTEAD = {
    STRIDED: (OFFSETS,),
    STRIDED_CAST: (OFFSETS_CAST,),
    ACROSS: (ACROSS, OFFSETS, STRIDED),
    FAR: (FAR, ACROSS, OFFSETS, STRIDED),
    JOINED: (JOINED, OFFSETS, STRIDED),
    CUMSUM_DOWN: (CUMSUM_DOWN, "reduction"),
    "cumsum": ("cumsum", "reduction"),
    "convolution": ("convolution", "elementwise"),
}
"""Fits that time a kind, best first; its own is the last."""


def _fit_of(kind: str, known: Calibration) -> Fit | None:
    """The best of the fits that there are for a kind."""
    names = (*INSTEAD.get(kind, ()), kind, kind.split()[0])
    return next((fit for name in names if (fit := known.fit(name)) is not None), None)


def _sizes(fit: Fit, moved: Number, count: Number, second: Number) -> tuple[Number, ...]:
    """What a fit wants to know of an op."""
    match fit.family.sizes:
        case ("elements", "bytes"):
            return count, moved
        case ("bytes", "largest"):
            whole = ELEMENT_BYTES * count
            return whole, np.minimum(whole, whole if second is None else ELEMENT_BYTES * second)
        case ("bytes", "steps"):
            return moved, 1.0 if second is None else second
        case _:
            return (ELEMENT_BYTES * count if fit.family.name in BY_ELEMENT else moved,)


def _second(op: Op, kind: str, dims: Dims) -> Number:
    """Elements of the largest part that is joined; steps of a sum down columns."""
    if kind == CUMSUM_DOWN:
        return evaluate(op.allocates[0].shape[-2:-1], dims) * 1.0
    if kind != JOINED:
        return None
    parts = [evaluate(buffer.shape, dims) for buffer in op.reads]
    parts += [evaluate(shape[:-1], dims) for shape in op.moved]
    largest: Number = 0.0
    for part in parts:
        largest = np.maximum(largest, part)
    return largest


BY_ELEMENT = (STRIDED, STRIDED_CAST)
"""Families that count elements as of two bytes, whatever they are."""
CPU_PLAIN = (STRIDED, STRIDED_CAST, ACROSS, FAR, JOINED, "cast", "cat")
"""Kinds that a CPU runs as plain ones: its loops go along rows, by vectors, whether these lie one
behind the other or not (aten/src/ATen/native/cpu/Loops.h, CatKernel.cpp)."""
TANH = re.compile(r"tanh|gelu|erf")
"""What a CPU computes for longer than it moves."""


def _on_gpu(op: Op, kind: str, speed: Speed) -> str:
    """The same on a GPU, which hides a tanh behind the bytes and not all of a gelu."""
    known = speed.calibration
    if kind == "elementwise" and op.kernel == "gelu" and known is not None:
        return ELEMENTWISE_TANH if ELEMENTWISE_TANH in known.fits else kind
    return kind


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


def byte_seconds(
    kind: str, moved: Number, count: Number, speed: Speed, second: Number = None
) -> Number:
    """Seconds of an op that moves bytes and makes `count` elements; `second`: see `_second`.

    A strided one takes an offset for each element, wide or not, and its bytes. Where it was timed
    by elements alone, it takes as long for wider ones until the bandwidth is full. One that is
    strided and converts takes, where nobody timed it, what both add to a plain one.
    """
    assert speed.calibration is not None
    cold = _fit_of(kind, speed.calibration)
    if kind == STRIDED_CAST and (cold is None or cold.family.name == STRIDED):
        plain = byte_seconds("elementwise", moved, count, speed)
        both = (byte_seconds(one, moved, count, speed) for one in (STRIDED, "cast"))
        return sum(both) - plain
    if kind == STRIDED and cold is None:  # of a CPU
        return byte_seconds("elementwise", moved, count, speed)
    assert cold is not None
    sizes = _sizes(cold, moved, np.maximum(count, 1.0), second)
    if cold.family.name in (*BY_ELEMENT, JOINED):
        sizes = tuple(np.maximum(size, NO_KERNEL_BYTES) for size in sizes)
        return np.maximum(cold.seconds(sizes), byte_seconds("elementwise", moved, count, speed))
    if len(sizes) > 1:
        return cold.seconds(sizes)
    return _warm_or_cold(kind, cold, moved, speed)


def _warm_or_cold(kind: str, cold: Fit, moved: Number, speed: Speed) -> Number:
    """What the op before has written still lies in the cache, where all of it fits."""
    assert speed.calibration is not None
    warm = speed.calibration.fits.get(f"{kind}:warm")
    if warm is None:
        return cold.seconds((moved,))
    fits = np.asarray(moved) <= (speed.gpu.l2_bytes or 0)
    return np.where(fits, warm.seconds((moved,)), cold.seconds((moved,)))
