"""Op → seconds, and a pass as the sum of its ops: by fits where a device was measured.

A pass that a CUDA graph replays takes what its kernels take, one after the other, and the replay's
floor. An eager pass takes the longer of that and of what the host needs to issue the ops
(host_cost.py). Without a calibration stated efficiencies of the datasheet's ceilings stand in, with
a wide band. No op is faster than FLOPs over peak, nor, for traffic beyond the L2 cache, than bytes
over bandwidth.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from planner.catalog.gpus import Gpu
from planner.program import Dims, Number, Op, Program, evaluate, maximum
from planner.timing.calibration import TRANSFERRED, Calibration, calibration_of
from planner.timing.expert_tiles import rows_of_tiles
from planner.timing.op_families import (
    ALIAS,
    ELEMENT_BYTES,
    ELEMENTWISE_TANH,
    FEW_ROWS,
    GEMM,
    GEMM_FEW,
    MASKED,
    NORM_RMS,
    STRIDED,
    STRIDED_CAST,
    gemm_family,
    triangle,
)
from planner.timing.op_kinds import (
    Attention,
    Batched,
    Bytes,
    Grouped,
    Nothing,
    Product,
    Timed,
    elements,
    moved_bytes,
    timed_ops,
)
from planner.timing.op_times import Fit, Roof

DEFAULT = Roof(
    floor_s=3e-6, compute=0.7, bandwidth=0.75, extra_flops=0.0, extra_bytes=1e6, power=3.0
)
"""An op of a GPU that nobody measured: among those that were (catalog/calibration), bf16 products
are fitted with 0.61–0.91 of peak and 0.74–0.91 of bandwidth, from at most 4.2 µs on."""
DEFAULT_ERROR = 0.4
"""How far a time by `DEFAULT` is said to be off: stated, not fitted, and wide on purpose."""
UNTIMED_ERROR = 0.8
"""The same of a whole pass on a device none of whose ops was timed, or by another CPU's: all its
ops err alike. Only 13 of 32 published runs on MI300Xs lie within 0.4."""
NO_KERNEL_BYTES = 512.0


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
            ratio = 1.0 if kind.head else speed.weight_ratio
            moved = moved - op.weight_bytes * (1.0 - ratio)
            m, n, k = kind.sizes(dims)
            family = _product_family(speed, dtype, (m, n, k), kind.free)
            if ratio < 1.0 and ALIAS.get(dtype, dtype) != "fp8":
                n = n * ratio  # weight-only: as a product over as many bytes of weights
            fit = _covering(speed, family, dtype, (m, n, k))
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
            fit = _covering(speed, "grouped", dtype, sizes)
            free, family = (0, 1), "grouped"
            if fit is not None and _torch_groups(speed):
                seconds = _as_one_product(fit, sizes, speed)
                return _timed(timed, family, fit, seconds, sizes, flops, moved, speed)
        case Attention():
            return _attention_time(timed, kind, dims, speed, flops, moved)
        case Batched():
            dtype = speed.dtype if kind.dtype_bytes < 4 else "fp32"
            return _unmeasured(timed, "batched products", dtype, flops, moved, speed)
        case Bytes():
            return _bytes_time(timed, kind, dims, speed, moved)
        case Nothing():
            return None
    if fit is None:
        return _unmeasured(timed, family, dtype or speed.dtype, flops, moved, speed)
    seconds = fit.seconds(sizes, free)
    few = _few_rows(speed, dtype) if isinstance(kind, Product) else None
    if few is not None and np.any(by_row := np.asarray(sizes[0]) < FEW_ROWS):
        seconds = np.where(by_row, few.seconds(sizes, free), seconds)
        fit = few if np.all(by_row) else fit
    if speed.fused and isinstance(kind, Grouped):
        seconds = _one_row_each(rows, sizes, seconds, flops, moved, speed)
    if speed.fused and isinstance(kind, Product):
        unpacked = 0.0 if kind.head or speed.weight_ratio == 1.0 else flops / 2.0
        one = _streamed(fit, moved, unpacked, speed)
        seconds = np.where(np.asarray(sizes[0]) <= 1, one, seconds)
    return _timed(timed, family, fit, seconds, sizes, flops, moved, speed)


def _product_family(speed: Speed, dtype: str, sizes: tuple[Number, ...], free: int) -> str:
    """By how rows lie in memory, where that was measured; batch and tokens are multiples of 8."""
    fixed = [round(float(np.ravel(size)[0])) for place, size in enumerate(sizes) if place != free]
    family = gemm_family(dtype, *fixed)
    known = speed.calibration is not None and speed.calibration.fit(family, dtype) is not None
    return family if known else GEMM.name


def _few_rows(speed: Speed, dtype: str) -> Fit | None:
    """What times products of fewer rows than a block, where those were timed apart: on CPUs."""
    return None if speed.calibration is None else speed.calibration.fit(GEMM_FEW.name, dtype)


LARGE_PRODUCT = (1.0, 32768.0, 8192.0)
UNPACKING = 3
"""Vector instructions for a quantised weight in a product of one row: convert, multiply, add."""


def _streamed(fit: Fit, moved: Number, unpacked: Number, speed: Speed) -> Number:
    """A compiler makes a reduction of a product of one row, which streams the weights.

    At the rate that a product over 537 MB of weights reaches, without the small ones' penalties
    (torch/_inductor/decomposition.py: mm of one row is a product and a sum). Weights that are
    unpacked on the way keep the vector units busy, at half their FLOP/s (an instruction is no
    multiply-add); both overlap as the fit's computing and moving do.
    """
    _, large = fit.family.work(*LARGE_PRODUCT, fit.dtype)
    known = None if speed.calibration is None else speed.calibration.fit("elementwise")
    launch_s = fit.roof.floor_s if known is None else known.seconds((NO_KERNEL_BYTES,))
    streaming = moved * fit.seconds(LARGE_PRODUCT) / large
    if np.all(np.asarray(unpacked) == 0):
        return launch_s + streaming
    issuing = UNPACKING * unpacked / (speed.gpu.flops_per_s("fp32") / 2.0)
    p = fit.roof.power
    return launch_s + (streaming**p + issuing**p) ** (1.0 / p)


def _one_row_each(
    rows: Number,
    sizes: tuple[Number, ...],
    seconds: Number,
    flops: Number,
    moved: Number,
    speed: Speed,
) -> Number:
    """Experts that are reached by a row each are streamed as one product of a row is."""
    _, reached, n, k = sizes
    fit = _covering(speed, "gemm", speed.product_dtype, (1, reached * n, k))
    if fit is None:
        return seconds
    one = _streamed(fit, moved, 0.0 if speed.expert_ratio == 1.0 else flops / 2.0, speed)
    return np.where(np.asarray(rows) <= reached * (1.0 + ROUNDING), one, seconds)


ROUNDING = 1e-9
"""Of an expectation that is a whole number."""


def _three_reductions(moved: Number, speed: Speed) -> Number:
    """Attention of one query, where a compiler writes it: scores, softmax, weighted values.

    Each is a kernel that streams (torch/_inductor/decomposition.py: bmm of one row is a product and
    a sum). gpt-fast turns the fused kernels off while it decodes, as that is faster
    (generate.py, decode_n_tokens).
    """
    known, product = (
        None if speed.calibration is None else speed.calibration.fit(*name)
        for name in (("elementwise",), ("gemm", speed.dtype))
    )
    if known is None or product is None:
        return np.inf
    launch_s = known.seconds((NO_KERNEL_BYTES,))
    return 2 * launch_s + _streamed(product, moved, 0.0, speed)


def _torch_groups(speed: Speed) -> bool:
    """Whether torch's own grouped product runs: bf16 on Hopper, where nothing is compiled."""
    torch_runs = speed.backends[:1] == ("cudnn",) and not speed.fused
    return torch_runs and (speed.gpu.compute_capability or "").startswith("9.")


def _as_one_product(fit: Fit, sizes: tuple[Number, ...], speed: Speed) -> Number:
    """No faster than one product of as many rows."""
    filled, _, n, k = sizes
    seconds = fit.seconds(sizes, (0, 1))
    dense = _covering(speed, "gemm", speed.product_dtype, (filled, n, k))
    return seconds if dense is None else np.maximum(seconds, dense.seconds((filled, n, k)))


def _bytes_time(timed: Timed, kind: Bytes, dims: Dims, speed: Speed, moved: Number) -> OpTime:
    """An op that computes next to nothing."""
    op, known = timed.op, speed.calibration
    name = _on_cpu(op, kind.kind, speed) if speed.gpu.is_cpu else kind.kind
    fit = None if known is None else known.fit(name) or known.fit(name.split()[0])
    if fit is None:
        return _unmeasured(timed, kind.kind, speed.dtype, 0.0, moved, speed)
    size = np.maximum(moved, NO_KERNEL_BYTES)
    seconds = byte_seconds(name, size, elements(op, dims) * 1.0, speed)
    if op.sometimes:
        seconds = seconds * (np.asarray(moved) > 0)
    return _timed(timed, kind.kind, fit, seconds, (size,), 0.0, moved, speed)


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


def _covering(speed: Speed, family: str, dtype: str, sizes: tuple[Number, ...]) -> Fit | None:
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


def _attention_time(
    timed: Timed, kind: Attention, dims: Dims, speed: Speed, flops: Number, moved: Number
) -> OpTime:
    """One query a sequence is decode, more are prefill over as many causal pairs.

    A kernel that is given a mask takes longer for a pair than a causal one, and has its own fit.
    """
    calibration, B = speed.calibration, np.asarray(dims.batch, dtype=np.float64)
    pairs = np.asarray(kind.pairs_of(dims), dtype=np.float64)
    heads = (kind.heads, kind.kv_heads, kind.head_dim)
    several = np.asarray(dims.tokens) > 1
    family = "attention_backward" if kind.backward else "prefill"
    backends = (kind.backend, *speed.backends) if kind.backend else speed.backends
    if kind.head_dim > WIDEST_HEAD and backends[:1] == ("cudnn",):
        backends = (EFFICIENT, *backends)
    if kind.keys is not None and speed.dtype != "fp32":  # fp32 has the same kernel without a mask
        backends = (MASKED, *backends)
    parts: list[tuple[Number, Fit | None, tuple[Number, ...], str]] = []
    if kind.backward or np.any(several):
        fit = None if calibration is None else calibration.fit(family, speed.dtype, *backends)
        parts.append((several, fit, (B, triangle(pairs), *heads), family))
    if not kind.backward and not np.all(several):
        held = pairs if kind.held is None else np.maximum(pairs, evaluate((kind.held,), dims))
        parts.append((~several, *_decode_fit(kind, backends, B, held, speed), "decode"))
    if any(fit is None for _, fit, _, _ in parts):
        return _unmeasured(timed, parts[0][3], speed.dtype, flops, moved, speed)
    hidden = pairs / np.maximum(np.asarray(kind.pairs.of(dims), dtype=np.float64), 1.0)
    computed = flops * hidden
    seconds: Number = 0.0
    clocked: Number = 0.0
    for where, fit, sizes, name in parts:
        assert fit is not None
        one, computing = fit.seconds(sizes), _computing_s(fit, computed)
        if speed.fused and name == "decode":
            one = np.minimum(one, _three_reductions(moved, speed))
        seconds = one if len(parts) == 1 else seconds + np.where(where, one, 0.0)
        clocked = computing if len(parts) == 1 else clocked + np.where(where, computing, 0.0)
    _, fit, sizes, family = parts[0]
    assert fit is not None
    made = _timed(timed, family, fit, seconds, sizes, flops, moved, speed)
    return replace(made, clocked_s=np.minimum(made.seconds, clocked), computed_flops=computed)


EFFICIENT = "efficient"
WIDEST_HEAD = 256
"""Of flash and cuDNN's attention (sdp_utils.cpp: check_head_dim_size_flash)."""
EFFICIENT_QUERIES = 64
"""A block of the memory-efficient kernel has so many queries, be there one or all (fmha_cutlassF_…_
aligned_64x64, 64x128; aten/src/ATen/native/transformers/cuda/mem_eff_attention)."""


def _decode_fit(
    kind: Attention, backends: tuple[str, ...], B: Number, pairs: Number, speed: Speed
) -> tuple[Fit | None, tuple[Number, ...]]:
    """The fit of one query's attention, and its sizes."""
    calibration, heads = speed.calibration, (kind.heads, kind.kv_heads, kind.head_dim)
    if calibration is None:
        return None, (B, pairs, *heads)
    if backends[:1] == (EFFICIENT,):
        fit = calibration.fit("prefill", speed.dtype, *backends)
        together = kind.heads if kind.head_dim > WIDEST_HEAD else 1  # heads over one latent
        blocks = B * kind.heads / together * np.ceil(together / EFFICIENT_QUERIES)
        whole = speed.gpu.multiprocessors or 1
        waves = np.ceil(blocks / whole) * whole  # as long as if all were busy
        each = (kind.heads / together, max(kind.kv_heads / together, 1.0), kind.head_dim)
        return fit, (waves / each[0], triangle(EFFICIENT_QUERIES * pairs), *each)
    fit = calibration.fit("decode", "fp8" if kind.kv_bytes == 1 else speed.dtype, *backends)
    return fit or calibration.fit("decode", speed.dtype, *backends), (B, pairs, *heads)


def _timed(
    timed: Timed,
    family: str,
    fit: Fit,
    seconds: Number,
    sizes: tuple[Number, ...],
    flops: Number,
    moved: Number,
    speed: Speed,
) -> OpTime:
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
        clocked_s=np.minimum(seconds, _computing_s(fit, flops)),
        computed_flops=flops,
        flops=flops,
        moved_bytes=moved,
        error=off,
        basis="interpolated" if inside else "extrapolated",
    )


def _computing_s(fit: Fit, flops: Number) -> Number:
    """What the FLOPs take at the rate that the fit's large ops reach."""
    return flops / (fit.peak_flops_per_s * fit.roof.compute)


def _unmeasured(
    timed: Timed, family: str, dtype: str, flops: Number, moved: Number, speed: Speed
) -> OpTime:
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
