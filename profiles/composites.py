"""Kinds of kernels that were timed among others only: a mean in a norm, softmax between two casts.

    mean    = norm − (upcast, square, two on a column, two strided products, rounding)
    strided = norm − (upcast, square, two on a column, mean, rounding), the two together
    softmax = softmax in float32 of bf16, and back − (upcast, rounding)

A norm of a few rows leaves its mean: torch gives each row a warp, so that most of a GPU idles
(ATen/native/cuda/Reduce.cuh). One of so many rows that the mean streams leaves its two products by
a row and by a column. A convolution and sums along a dimension were timed at large sizes
alone: of small ones they take what the launches of their kernels take. What is known by then is the
fit that op_samples.py's rows gave.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

from planner.catalog.gpus import Gpu
from planner.program import Number
from planner.timing.attention_times import one_query_sizes
from planner.timing.byte_times import byte_seconds
from planner.timing.calibration import Calibration
from planner.timing.clock import Speed
from planner.timing.op_families import STRIDED
from planner.timing.op_times import Fit
from profiles.microbench.op_record import OpRecord, merged

LEAST_S = 1e-7
"""Less than any kernel takes: what is left of noise."""
FEW_ROWS, MANY_ROWS = 256, 8192
"""Up to which a mean takes its latency, and from which on it streams."""
Rows: TypeAlias = list[tuple[list[float], float, bool]]


def launches(
    records: Iterable[OpRecord], element_bytes: float, kernels: int = 1, *more: float
) -> Rows:
    """An op on one row: what a copy of it takes, of which next to nothing is moving.

    `element_bytes`: what the op moves for each element; `more`: its further sizes.
    """
    return [
        ([element_bytes * _count(r), *more], kernels * _median(r), False)
        for r in _measured(records, "bandwidth", "copy")
        if r.shape["rows"] == 1 and r.cache == "cold" and r.split == "calibration"
    ]


def streaming_means(records: Iterable[OpRecord]) -> Rows:
    """The sum of a tensor far larger than any cache, which a ceiling was measured with."""
    return [
        ([float(r.bytes)], r.median_s, False)
        for r in _measured(records, "ceiling", "sum")
        if r.median_s is not None
    ]


def means(records: Iterable[OpRecord], known: Mapping[str, Fit], gpu: Gpu) -> Rows:
    """By bytes read: what a norm of few rows leaves, and what streams."""
    records, rows = list(records), list[tuple[list[float], float, bool]]()
    for record in _measured(records, "bandwidth", "rmsnorm"):
        if record.shape["rows"] <= FEW_ROWS and record.cache == "cold":
            left_s = _median(record) - _around_mean(record, known, gpu)
            for size in _product_sizes(record):
                left_s -= _seconds(STRIDED, size, record, known, gpu)
            rows.append(_row(record, 4.0 * _count(record), left_s))
    return rows + streaming_means(records)


def products(records: Iterable[OpRecord], known: Mapping[str, Fit], gpu: Gpu) -> Rows:
    """Products of a norm of many rows by a column and by a row, `known` has the mean.

    What is left is theirs together, cut as what is known of them so far; nothing else was timed of
    so many elements.
    """
    rows: Rows = []
    for record in _measured(records, "bandwidth", "rmsnorm"):
        if record.shape["rows"] < MANY_ROWS or record.cache != "cold":
            continue
        left_s = _median(record) - _around_mean(record, known, gpu)
        left_s -= _seconds("mean", 4.0 * _count(record), record, known, gpu)
        sizes = _product_sizes(record)
        known_s = [_seconds(STRIDED, size, record, known, gpu) for size in sizes]
        for size, part_s in zip(sizes, known_s, strict=True):
            taken_s = max(left_s * part_s / sum(known_s), LEAST_S)
            row = [float(_count(record)), float(size)]
            rows.append((row, taken_s, record.split == "held-out"))
    return rows


def _product_sizes(record: OpRecord) -> tuple[int, int]:
    """Bytes of a product in float32 by a column, and of one in the dtype by a row."""
    return 8 * _count(record), (8 if record.dtype == "fp32" else 4) * _count(record)


def softmaxes(records: Iterable[OpRecord], known: Mapping[str, Fit], gpu: Gpu) -> Rows:
    """By bytes read and written."""
    rows: Rows = []
    for record in _measured(records, "bandwidth", "softmax"):
        n = _count(record)
        left_s = _median(record)
        if record.dtype != "fp32":
            left_s -= _seconds("cast", 6 * n, record, known, gpu)
            left_s -= _seconds("elementwise", 6 * n, record, known, gpu)
        rows.append(_row(record, 8.0 * n, left_s))
    return rows


def one_queries(records: Iterable[OpRecord], gpu: Gpu) -> Rows:
    """One query a sequence over latents, by the kernel that serves prompts too."""
    rows: Rows = []
    for record in _measured(records, "decode", "sdpa_latent"):
        s = record.shape
        wide = (s["width"] + s["values"]) / 2
        sizes = one_query_sizes(s["batch"], s["context"], s["heads"], s["heads"], wide, gpu)
        held_out = record.split == "held-out"
        rows.append(([float(size) for size in sizes], _median(record), held_out))
    return rows


def _around_mean(record: OpRecord, known: Mapping[str, Fit], gpu: Gpu) -> float:
    """A norm's kernels but for its mean and its products by a row or a column."""
    n, column = _count(record), record.shape["rows"]
    sizes = [8 * n, 8 * column, 8 * column]
    casts_s = 0.0
    if record.dtype != "fp32":
        casts_s = _seconds("cast", 6 * n, record, known, gpu)
        sizes.append(6 * n)
    return casts_s + sum(_seconds("elementwise", size, record, known, gpu) for size in sizes)


def _seconds(kind: str, size: float, record: OpRecord, known: Mapping[str, Fit], gpu: Gpu) -> float:
    timed = Calibration(gpu=gpu.name, fits=known, sources={})
    speed = Speed(gpu=gpu, dtype=record.dtype, calibration=timed)
    seconds: Number = byte_seconds(kind, size, _count(record), speed)
    return float(seconds)


def _measured(records: Iterable[OpRecord], family: str, op: str) -> list[OpRecord]:
    return [
        r
        for r in merged(records).values()
        if (r.family, r.op, r.status) == (family, op, "ok") and r.samples_s
    ]


def _median(record: OpRecord) -> float:
    assert record.median_s is not None
    return record.median_s


def _count(record: OpRecord) -> int:
    return record.shape["rows"] * record.shape["width"]


def _row(record: OpRecord, size: float, seconds: float) -> tuple[list[float], float, bool]:
    return [size], max(seconds, LEAST_S), record.split == "held-out"
