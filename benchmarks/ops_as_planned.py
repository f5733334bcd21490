"""Ops of scans, mixtures and halves, as measured and as programs' kinds time them today.

    python benchmarks/ops_as_planned.py --records profiles/data/microbench/h200.jsonl

A ratio far from 1 says that the op wants a family of its own. Calibration shapes and held-out ones
are told apart: rules may be chosen on the first alone. What lies between unlike kernels of a graph
is printed too, and fp16 beside bf16 at the same sizes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path

from planner.catalog.gpus import gpu_named
from planner.timing.byte_times import byte_seconds
from planner.timing.calibration import calibration_of
from planner.timing.clock import DEFAULT, Speed
from planner.timing.op_families import (
    ACROSS,
    BMM,
    CUMSUM_DOWN,
    ELEMENTWISE_TANH,
    FAR,
    STRIDED,
    STRIDED_CAST,
)
from profiles.microbench.graph_ops import UNLIKE, UNLIKE_PRODUCTS
from profiles.microbench.op_record import OpRecord, load, merged
from profiles.microbench.scan_points import CALIBRATION, HELD_OUT, kernel_points, whole_scan_points

KINDS: Mapping[str, tuple[str, ...]] = {
    "clone_heads": (STRIDED,),
    "clone_turned": (ACROSS,),
    "clone_across": (FAR,),
    "clone_t": (ACROSS,),
    "add_turned": (FAR,),
    "mul_steps": (ACROSS,),
    "mul_heads": (STRIDED_CAST,),
    "silu_cut": (STRIDED,),
    "repeat_heads": (ACROSS,),
    "pad_tokens": ("cat",),
    "mask_expanded": (STRIDED, STRIDED),
    "mask_pairs": ("elementwise", STRIDED),
    "cumsum_pairs": (CUMSUM_DOWN,),
    "cumsum_tokens": ("cumsum",),
    "exp": ("elementwise",),
    "mul_pairs": (STRIDED,),
    "mul_decays": (STRIDED,),
    "mul_column": (STRIDED,),
    "conv1d": ("convolution",),
    "repeat_matrices": (STRIDED,),
    "repeat_matrices_t": (ACROSS,),
    "gelu": (ELEMENTWISE_TANH,),
    "gelu_new": ("elementwise",) * 8,
    "index_rows": ("gather",),
    "gather_picks": ("gather",),
    "scatter_places": ("gather",),
    "put_places": ("gather",),
    "floor_divide": ("elementwise",),
    "searchsorted": ("elementwise",),
    "cumsum_counts": ("cumsum",),
    "histc": ("elementwise",),
    "sum_picks": ("mean",),
}
"""How programs list them, a kind a kernel. A copy that masks is two kernels."""
WRITTEN: Mapping[str, float] = {
    "mask_expanded": 1.0,
    "repeat_heads": 1.0,
    "mul_pairs": 1 / 3,
    "add_turned": 1 / 3,
    "repeat_matrices": 1.0,
    "repeat_matrices_t": 1.0,
}
"""The part of an op's bytes that it writes, where that is not half of them."""
TWICE: Mapping[tuple[str, bool], float] = {
    ("repeat_heads", True): 2,
    ("pad_tokens", True): 3,
    ("clone_heads", True): 3,
    ("clone_heads", False): 2,
    ("mul_decays", True): 1.5,
}
"""Of a scan, what runs more than once, over the state's width (or, false, over a head's); two plain
sums and two casts are left out."""
MICRO = 1e6


def main() -> None:
    """Print the medians of measured / planned, by op and split."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("--records", type=Path, default=Path("profiles/data/microbench/h200.jsonl"))
    asked = parser.parse_args()
    if not asked.records.is_file():
        parser.error(f"--records {asked.records}: no such file")
    gpu = gpu_named(asked.gpu)
    speed = Speed(gpu=gpu, dtype="bf16", calibration=calibration_of(gpu))
    good = {key: r for key, r in merged(load(asked.records).ops).items() if r.status == "ok"}
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for record in good.values():
        planned_s = _planned_s(record, speed)
        if planned_s is not None and record.median_s is not None and not record.repeat:
            row = (record.median_s, record.median_s / planned_s)
            found.setdefault((record.op, record.dtype, record.split), []).append(row)
    print(f"{'op':<22}{'dtype':<7}{'split':<13}{'n':>3}{'longest':>11}  measured / planned")
    for (op, dtype, split), rows in sorted(found.items()):
        ratios = sorted(ratio for _, ratio in rows)
        longest_s = max(taken for taken, _ in rows)
        told = f"{statistics.median(ratios):.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{op:<22}{dtype:<7}{split:<13}{len(rows):>3}{longest_s * MICRO:>8.1f} µs  {told}")
    print(*_between(good), *_scans(good), *_half(good), sep="\n")


def _planned_s(record: OpRecord, speed: Speed) -> float | None:
    if record.op == "bmm":
        fit = speed.calibration and speed.calibration.fits.get(f"{BMM.name}:{record.dtype}")
        if fit:
            return float(fit.seconds([float(record.shape[i]) for i in ("batch", "m", "n", "k")]))
        peak = speed.gpu.flops_per_s(record.dtype)
        bandwidth = speed.gpu.memory_bandwidth_bytes_per_s
        return float(DEFAULT.seconds(record.flops, record.bytes, peak, bandwidth))
    if record.op not in KINDS or record.family != "bandwidth":
        return None
    size = 4 if record.dtype == "fp32" else 2
    kinds = KINDS[record.op]
    moved = record.bytes if len(kinds) < 3 else record.bytes * 1.25  # some of them read two
    count = record.bytes * WRITTEN.get(record.op, 0.5) / size
    steps = float(record.shape.get("chunk", 1))
    times = [byte_seconds(kind, float(moved), count, speed, steps) for kind in kinds[:-1]]
    last = 2.0 * size * count if record.op.startswith("mask") else float(moved)  # it fills in place
    return float(sum(times) + byte_seconds(kinds[-1], last, count, speed, steps))


def _scans(good: Mapping[str, OpRecord]) -> Iterator[str]:
    """A whole scan over the sum of its kernels, each as often as it runs."""
    for scan, whole in zip((*CALIBRATION, *HELD_OUT), whole_scan_points(), strict=True):
        sum_s = 0.0
        for point in kernel_points(scan, whole.split):
            width = point.shape.get("head_dim")
            times = TWICE.get((point.op, width == whole.shape["state"]), 1)
            record = good.get(point.key)
            if record is None or point.shape.get("pad"):
                sum_s += 0.0 if point.shape.get("pad") else float("nan")
                continue
            sum_s += times * (record.median_s or float("nan"))
        taken = good.get(whole.key)
        if taken is not None and taken.median_s is not None:
            told = f"{taken.median_s * MICRO:.0f} µs, its kernels {sum_s * MICRO:.0f}"
            yield f"scan {scan} ({whole.split}): {told}"


def _between(good: Mapping[str, OpRecord]) -> Iterator[str]:
    """Of graphs of unlike kernels what the mean of each kind's own leaves, a kernel."""
    graphs = {(r.op, *r.shape.values()): r.median_s for r in good.values() if r.family == "graph"}
    for op, kinds in (("unlike", UNLIKE), ("unlike_products", UNLIKE_PRODUCTS)):
        for width in (64, 4096):
            whole = graphs.get((op, 1000, width))
            alone = [graphs.get((f"alike_{kind}", 1000, width)) for kind in kinds]
            if whole is None or None in alone:
                continue
            mean_s = statistics.fmean(a for a in alone if a is not None) / 1000
            left_s = whole / 1000 - mean_s
            told = f"{left_s * MICRO:+.3f} µs a kernel beyond {mean_s * MICRO:.3f}"
            yield f"{op}, {width} wide: {told}"


def _half(good: Mapping[str, OpRecord]) -> Iterator[str]:
    """fp16 over bf16 at the same sizes: bursts, and watts and joules when it goes on."""
    for family, op in (("gemm", "linear"), ("gemm", "linear_bias"), ("prefill", "sdpa")):
        ratios = []
        for record in good.values():
            if (record.family, record.op, record.dtype) == (family, op, "fp16"):
                other = good.get(record.key.replace("/fp16/", "/bf16/"))
                if other is not None and other.median_s and record.median_s:
                    ratios.append(record.median_s / other.median_s)
        if ratios:
            low, high = min(ratios), max(ratios)
            middle = statistics.median(ratios)
            yield f"{op} of fp16 / of bf16: {middle:.3f} ({low:.3f} to {high:.3f}, {len(ratios)})"
    for r in good.values():
        if (r.family, r.op) == ("sustained", "linear") and r.energy_j and r.median_s:
            watts, joule = r.energy_j / r.median_s, r.energy_j / r.flops
            told = f"{watts:.0f} W, {joule:.3e} J a FLOP in all"
            yield f"sustained {r.dtype} m={r.shape['m']}: {told}"


if __name__ == "__main__":
    main()
