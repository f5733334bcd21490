"""Op → seconds, and a pass as the sum of its ops: by fits where a device was measured.

A pass that a CUDA graph replays takes what its kernels take, one after the other, and the replay's
floor. An eager pass takes the longer of that and of what the host needs to issue the ops
(host_cost.py). Without a calibration stated efficiencies of the datasheet's ceilings stand in, with
a wide band. No op is faster than FLOPs over peak, nor, for traffic beyond the L2 cache, than bytes
over bandwidth.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from planner.program import Dims, Number, Program, evaluate
from planner.timing.attention_times import attention_time
from planner.timing.byte_times import bytes_time
from planner.timing.clock import OpTime, Speed, by_default, by_fit, computing_s, covering
from planner.timing.compiled import one_row_each, streamed
from planner.timing.expert_tiles import rows_of_tiles
from planner.timing.op_families import (
    ALIAS,
    BMM,
    FEW_ROWS,
    GEMM,
    GEMM_FEW,
    gemm_family,
)
from planner.timing.op_kinds import (
    Attention,
    Batched,
    Bytes,
    Grouped,
    Nothing,
    Product,
    Timed,
    moved_bytes,
    timed_ops,
)
from planner.timing.op_times import Fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What one pass computes and moves, and the time of its kernels one after the other.

    `by_family_s` has the seconds of each family, and `error_s` how far the sum may be off: the 90th
    percentiles of the families' held-out errors, as if families erred apart and ops of one family
    together.
    """

    flops: Number
    moved_bytes: Number
    time_s: Number
    kernels: Number = 0
    by_family_s: dict[str, Number] = field(default_factory=dict, hash=False)
    error_s: Number = 0.0
    extrapolated_s: Number = 0.0
    clocked_s: Number = 0.0
    computed_flops: Number = 0.0

    def seconds(self, clock: Number) -> Number:
        """The time at a lower clock, which stretches what computes (power.py)."""
        return self.time_s + self.clocked_s * (1.0 / clock - 1.0)


def pass_cost(program: Program, dims: Dims, speed: Speed) -> Cost:
    """Sum over the ops, over every cell of `dims`."""
    flops: Number = 0.0
    moved: Number = 0.0
    time_s: Number = 0.0
    kernels: Number = 0
    extrapolated: Number = 0.0
    clocked: Number = 0.0
    computed: Number = 0.0
    by_family: dict[str, Number] = {}
    errors: dict[str, Number] = {}
    for made in op_times(program, dims, speed):
        n = made.timed.count
        seconds = n * made.seconds
        flops = flops + n * made.flops
        moved = moved + n * made.moved_bytes
        time_s = time_s + seconds
        clocked = clocked + n * made.clocked_s
        computed = computed + n * made.computed_flops
        kernels = kernels + n
        by_family[made.family] = by_family.get(made.family, 0.0) + seconds
        errors[made.family] = errors.get(made.family, 0.0) + made.error * seconds
        if made.basis != "interpolated":
            extrapolated = extrapolated + seconds
    square: Number = 0.0
    for off in errors.values():
        square = square + off * off
    return Cost(
        flops=flops,
        moved_bytes=moved,
        time_s=time_s,
        kernels=kernels,
        by_family_s=by_family,
        error_s=np.sqrt(square),
        extrapolated_s=extrapolated,
        clocked_s=clocked,
        computed_flops=computed,
    )


def op_times(program: Program, dims: Dims, speed: Speed) -> Iterator[OpTime]:
    """The time of every kind of op of a pass."""
    for timed in timed_ops(program, fused=speed.fused):
        made = _op_time(timed, dims, speed)
        if made is not None:
            yield made


def _op_time(timed: Timed, dims: Dims, speed: Speed) -> OpTime | None:
    op, kind = timed.op, timed.kind
    flops: Number = 0.0 if op.flops is None else evaluate(op.flops, dims) * 1.0
    moved = moved_bytes(op, dims) * 1.0
    sizes: tuple[Number, ...]
    free: tuple[int, ...]
    match kind:
        case Product():
            dtype = speed.dtype if kind.head else speed.product_dtype
            dtype = "fp32" if kind.wide else dtype
            ratio = 1.0 if kind.head or kind.wide else speed.weight_ratio
            moved = moved - op.weight_bytes * (1.0 - ratio)
            m, n, k = kind.sizes(dims)
            family = _product_family(speed, dtype, (m, n, k), kind.free)
            if ratio < 1.0 and ALIAS.get(dtype, dtype) != "fp8":
                n = n * ratio  # weight-only: as a product over as many bytes of weights
            fit = covering(speed, family, dtype, (m, n, k))
            sizes, free = (m, n, k), (kind.free,)
        case Grouped():
            dtype = speed.product_dtype
            rows, reached, n = evaluate(kind.m, dims), kind.reached.of(dims), kind.n
            ratio = speed.expert_ratio
            weights = sum(evaluate(s, dims) for s in op.moved if s[:1] == (kind.reached,))
            moved = moved - weights * (1.0 - ratio)
            if ratio < 1.0 and ALIAS.get(dtype, dtype) != "fp8":
                n = n * ratio
            sizes = (
                rows_of_tiles(kind, dims, torch_groups=_torch_groups(speed)),
                reached,
                n,
                kind.k,
            )
            own = replace(speed, backends=()) if _torch_groups(speed) else speed
            fit = covering(own, "grouped", dtype, sizes)  # torch's kernel before other engines'
            free, family = (0, 1), "grouped"
            if fit is not None and _torch_groups(speed):
                seconds = _as_one_product(fit, sizes, speed)
                return by_fit(timed, family, fit, seconds, sizes, flops, moved, speed)
        case Attention():
            return attention_time(timed, kind, dims, speed, flops, moved)
        case Batched():
            return _batched_time(timed, kind, dims, speed, flops, moved)
        case Bytes():
            return bytes_time(timed, kind, dims, speed, moved)
        case Nothing():
            return None
    if fit is None:
        return by_default(timed, family, dtype or speed.dtype, flops, moved, speed)
    seconds = fit.seconds(sizes, free)
    if dtype == "fp16" and isinstance(kind, Product) and speed.calibration is not None:
        longer = speed.calibration.half - 1.0
        seconds = seconds + longer * np.minimum(seconds, computing_s(fit, flops))
    few = _few_rows(speed, dtype) if isinstance(kind, Product) else None
    if few is not None and np.any(by_row := np.asarray(sizes[0]) < FEW_ROWS):
        seconds = np.where(by_row, few.seconds(sizes, free), seconds)
        fit = few if np.all(by_row) else fit
    if speed.fused and isinstance(kind, Grouped):
        seconds = one_row_each(rows, sizes, seconds, flops, moved, speed)
    if speed.fused and isinstance(kind, Product):
        unpacked = 0.0 if kind.head or speed.weight_ratio == 1.0 else flops / 2.0
        one = streamed(few or fit, moved, unpacked, speed)
        seconds = np.where(np.asarray(sizes[0]) <= 1, one, seconds)
    return by_fit(timed, family, fit, seconds, sizes, flops, moved, speed)


def _batched_time(
    timed: Timed, kind: Batched, dims: Dims, speed: Speed, flops: Number, moved: Number
) -> OpTime:
    """Products of many pairs of matrices, by their fit where it covers them."""
    dtype, family = speed.dtype if kind.dtype_bytes < 4 else "fp32", "batched products"
    default = by_default(timed, family, dtype, flops, moved, speed)
    fit = speed.calibration.fit(BMM.name, dtype) if speed.calibration and kind.mnk else None
    if fit is None:
        return default
    sizes = kind.sizes(dims)
    inside = fit.inside(sizes[1:], 1)
    if not np.any(inside):
        return default
    seconds = fit.seconds(sizes) if kind.is_fixed else fit.seconds_at(sizes)
    made = by_fit(timed, family, fit, seconds, sizes, flops, moved, speed)
    if np.all(inside):
        return made
    return replace(
        made,
        seconds=np.where(inside, made.seconds, default.seconds),
        clocked_s=np.where(inside, made.clocked_s, default.clocked_s),
    )


def _product_family(speed: Speed, dtype: str, sizes: tuple[Number, ...], free: int) -> str:
    """By how rows lie in memory, where that was measured; batch and tokens are multiples of 8."""
    fixed = [round(float(np.ravel(size)[0])) for place, size in enumerate(sizes) if place != free]
    family = gemm_family(dtype, *fixed)
    known = speed.calibration is not None and speed.calibration.fit(family, dtype) is not None
    return family if known else GEMM.name


def _few_rows(speed: Speed, dtype: str) -> Fit | None:
    """What times products of fewer rows than a block, where those were timed apart: on CPUs."""
    return None if speed.calibration is None else speed.calibration.fit(GEMM_FEW.name, dtype)


def _torch_groups(speed: Speed) -> bool:
    """Whether torch's own grouped product runs: bf16 on Hopper, where nothing is compiled."""
    torch_runs = speed.backends[:1] == ("cudnn",) and not speed.fused
    return torch_runs and (speed.gpu.compute_capability or "").startswith("9.")


def _as_one_product(fit: Fit, sizes: tuple[Number, ...], speed: Speed) -> Number:
    """No faster than one product of as many rows."""
    filled, _, n, k = sizes
    seconds = fit.seconds(sizes, (0, 1))
    dense = covering(speed, "gemm", speed.product_dtype, (filled, n, k))
    return seconds if dense is None else np.maximum(seconds, dense.seconds((filled, n, k)))
