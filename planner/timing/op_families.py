"""Families of ops that are timed alike: by which sizes, and what they must compute and move.

A family's time is a smooth roofline of its FLOPs and bytes times a residual over the logarithms of
its sizes (op_times.py). Both are fitted to measured ops (profiles/calibrate.py), so what a family
counts is written down once, here. FLOPs: a multiply and an add are two; causal attention counts the
pairs that the mask lets through. Bytes: inputs once, outputs once.

Sizes.  m, n, k of y[m, n] = x[m, k] · Wᵀ · batch B · query tokens T · cached tokens S · query heads
H · key-value heads G · head dim D · experts E that are reached · bytes read and written
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from planner.program import Number

Work: TypeAlias = tuple[Number, Number]
"""FLOPs and bytes."""

WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0}
"""Bytes of a weight, by the dtype that products run in."""

MASKED = "masked"
"""Attention behind a mask of its own, as a backend: whichever kernel torch picks that takes one."""

ALIGNED_ELEMENTS = 8
"""Elements of 2 bytes in 16."""

ALIAS = {"fp16": "bf16", "fp32": "fp32", "bf16": "bf16", "fp8": "fp8"}
"""Dtypes that run at one speed share a fit (the same units, the same bytes)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """`work` takes the sizes in the order of `sizes`, and the dtype."""

    name: str
    sizes: tuple[str, ...]
    work: Callable[..., Work]
    scales: tuple[float, ...]
    """Octaves over which the residual at one size forgets another."""
    free: tuple[int, ...] = (0,)
    """Which sizes vary with batch and tokens; a model fixes the others."""


def gemm_work(m: Number, n: Number, k: Number, dtype: str) -> Work:
    """2·m·n·k; x and W in the dtype, y in it too but for fp8, which leaves bf16."""
    b = WEIGHT_BYTES[dtype]
    out = max(b, 2.0)
    return 2.0 * m * n * k, b * (m * k + n * k) + out * m * n


def few_rows_work(m: Number, n: Number, k: Number, dtype: str) -> Work:
    """2·m·n·k; a CPU's libraries go over the weights once for each of so few rows."""
    return 2.0 * m * n * k, WEIGHT_BYTES[dtype] * m * (n * k + n + k)


def gemm_family(dtype: str, *fixed: Number) -> str:
    """The family of a product whose weight and activation have these fixed sizes."""
    if WEIGHT_BYTES.get(ALIAS.get(dtype, dtype)) != 2.0:
        return "gemm"
    if any(size % 2 for size in fixed):
        return "gemm_odd"
    return "gemm_even" if any(size % ALIGNED_ELEMENTS for size in fixed) else "gemm"


def decode_work(B: Number, S: Number, H: Number, G: Number, D: Number, dtype: str) -> Work:
    """4·B·H·S·D; keys and values in the cache's dtype, one query and output a head in bf16."""
    b = WEIGHT_BYTES[dtype]
    return 4.0 * B * H * S * D, 2.0 * b * B * G * S * D + 4.0 * B * H * D


def latent_work(B: Number, S: Number, H: Number, W: Number, dtype: str) -> Work:
    """2·B·H·S·(2·W − 64): scores over W = d_c + 64 numbers of a latent, values over its d_c.

    Latents once for all heads, a query and an output a head in bf16.
    """
    flops = 2.0 * B * H * S * (2.0 * W - LATENT_ROPE)
    return flops, WEIGHT_BYTES[dtype] * B * S * W + 4.0 * B * H * W


def blocks_work(N: Number, S: Number, W: Number, dtype: str) -> Work:
    """2·N·32·S·(2·W − 64): blocks of 32 queries, each over the same latents of W numbers."""
    flops = 2.0 * N * WIDE_QUERIES * S * (2.0 * W - LATENT_ROPE)
    return flops, WEIGHT_BYTES[dtype] * S * W


def prefill_work(B: Number, T: Number, H: Number, G: Number, D: Number, dtype: str) -> Work:
    """4·B·H·D·T·(T + 1)/2: causal, over the prompt itself."""
    b = WEIGHT_BYTES[dtype]
    return 2.0 * B * H * D * T * (T + 1.0), 2.0 * b * B * T * D * (H + G)


def triangle(pairs: Number) -> Number:
    """T whose causal attention has so many pairs: T·(T + 1)/2."""
    return (np.sqrt(1.0 + 8.0 * np.asarray(pairs, dtype=np.float64)) - 1.0) / 2.0


def grouped_work(m: Number, E: Number, n: Number, k: Number, dtype: str) -> Work:
    """2·m·n·k, over the weights of E experts."""
    b = WEIGHT_BYTES[dtype]
    return 2.0 * m * n * k, b * (m * k + E * n * k + m * n)


def backward_work(B: Number, T: Number, H: Number, G: Number, D: Number, dtype: str) -> Work:
    """Five products where forward has two; q, k, v, out and gradients of them."""
    flops, _ = prefill_work(B, T, H, G, D, dtype)
    return 2.5 * flops, 4.0 * WEIGHT_BYTES[dtype] * B * T * D * (H + G)


def bytes_work(size: Number, dtype: str) -> Work:
    """Nothing but bytes."""
    return 0.0 * size, size


ELEMENT_FLOPS, STEP_FLOPS, PART_FLOPS = 1e3, 2e8, 1e3
"""What a kernel that no FLOP holds up is held up by, in FLOPs that a GPU's peak has in about that
time: by an offset, by a step of a sum, by a byte of the largest part. A scale alone: the share of
the peak is fitted."""


def offsets_work(elements: Number, size: Number, dtype: str) -> Work:
    """An offset for each element, beside the bytes."""
    return ELEMENT_FLOPS * elements, size


def joined_work(size: Number, largest: Number, dtype: str) -> Work:
    """Blocks are dealt out by part, as many to each: the largest is waited for."""
    return PART_FLOPS * largest, size


def summed_work(size: Number, steps: Number, dtype: str) -> Work:
    """Sums along a dimension by a thread for each column, one step after the other."""
    return STEP_FLOPS * steps, size


def batched_work(pairs: Number, m: Number, n: Number, k: Number, dtype: str) -> Work:
    """2·m·n·k of each pair of matrices."""
    b = WEIGHT_BYTES[dtype]
    return 2.0 * pairs * m * n * k, b * pairs * (m * k + n * k + m * n)


GEMM = Family(name="gemm", sizes=("m", "n", "k"), work=gemm_work, scales=(3.0, 4.0, 4.0))
GEMM_EVEN = replace(GEMM, name="gemm_even")
GEMM_ODD = replace(GEMM, name="gemm_odd")
"""Products with rows of 2-byte elements that do not all begin at 16 bytes, because a fixed size is
no multiple of 8, or is odd: the kernels that load 16 bytes at once cannot take them."""
FEW_ROWS = 4
"""From so many rows on a CPU's libraries multiply blocks of them; below, row by row: 3 rows take
longer than 4 (profiles/data/microbench/cpu.jsonl, all sizes of weights)."""
GEMM_FEW = replace(GEMM, name="gemm_few", work=few_rows_work, scales=(1.0, 4.0, 4.0))
GROUPED = Family(
    name="grouped",
    sizes=("m", "E", "n", "k"),
    work=grouped_work,
    scales=(3.0, 4.0, 4.0, 4.0),
    free=(0, 1),
)
ATTENTION_SIZES = ("H", "G", "D")
LATENT_ROPE = 64.0
"""Rotated numbers of a latent, in all that were timed (DeepSeek's)."""
WIDE_QUERIES = 32
"""Queries of a block of the memory-efficient kernel over heads wider than 128 (the name of what
runs: fmha_cutlassF_bf16_aligned_32x128_gmem); heads over one latent are queries of one head."""
LATENT_BLOCKS = Family(
    name="latent_blocks",
    sizes=("N", "S", "W"),
    work=blocks_work,
    scales=(3.0, 2.0, 2.0),
    free=(0, 1),
)
LATENT_DECODE = Family(
    name="latent_decode",
    sizes=("B", "S", "H", "W"),
    work=latent_work,
    scales=(2.0, 2.0, 3.0, 2.0),
    free=(0, 1),
)
DECODE = Family(
    name="decode",
    sizes=("B", "S", *ATTENTION_SIZES),
    work=decode_work,
    scales=(2.0, 2.0, 3.0, 2.0, 2.0),
    free=(0, 1),
)
PREFILL = Family(
    name="prefill",
    sizes=("B", "T", *ATTENTION_SIZES),
    work=prefill_work,
    scales=(3.0, 3.0, 4.0, 4.0, 2.0),
    free=(0, 1),
)
BACKWARD = Family(
    name="attention_backward",
    sizes=("B", "T", *ATTENTION_SIZES),
    work=backward_work,
    scales=(4.0, 4.0, 4.0, 4.0, 2.0),
    free=(0, 1),
)
BYTE_KINDS = (
    "elementwise",
    "norm",
    "reduction",
    "softmax",
    "mean",
    "cast",
    "cat",
    "gather",
    "optimizer",
    "sort",
    "topk",
    "convolution",
    "cumsum",
)
"""Ops that compute next to nothing, by how well they stream."""
STRIDED = "strided"
STRIDED_CAST = "strided cast"
ACROSS, FAR = "across", "far"
"""Of strided ones those that read across what they write: neighbours that are written are read from
sectors of 32 bytes of their own, which one block of threads uses up or, far, leaves to others."""
JOINED = "joined"
"""Parts that are joined element by element (ATen/native/cuda/Shape.cu: CatArrayBatchedCopy)."""
CUMSUM_DOWN = "cumsum down"
""""cumsum" is along the innermost dimension."""
ELEMENTWISE_TANH = "elementwise:tanh"
NORM_RMS = "norm:rms"
"""Elementwise ops around a tanh, which take their time to compute (on a GPU gelu alone), and, of
CPUs, the norm that is one kernel on a GPU and six there."""
OFFSETS, OFFSETS_CAST = "offsets", "offsets cast"
"""Families of strided ones by elements and bytes; `STRIDED` are those by elements alone, of devices
that were calibrated before these were."""
ELEMENT_BYTES = 4.0
"""Read and written of an element of two bytes: by it strided kernels, which take as long for wider
elements until these fill the bandwidth, are given a size in bytes."""
COMMUNICATION = ("all_reduce", "all_gather", "reduce_scatter")
"""By the GPUs that take part ("all_reduce:4"); bytes are those of all parts together."""


def _bytes(name: str) -> Family:
    return Family(name=name, sizes=("bytes",), work=bytes_work, scales=(3.0,))


def _by_two(name: str, sizes: tuple[str, str], work: Callable[..., Work]) -> Family:
    return Family(name=name, sizes=sizes, work=work, scales=(3.0, 3.0), free=(0, 1))


BMM = Family(
    name="bmm", sizes=("pairs", "m", "n", "k"), work=batched_work, scales=(3.0, 3.0, 3.0, 3.0)
)
"""Products of as many pairs of matrices, each pair alone."""


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        GEMM,
        GEMM_EVEN,
        GEMM_ODD,
        GEMM_FEW,
        GROUPED,
        DECODE,
        LATENT_DECODE,
        LATENT_BLOCKS,
        PREFILL,
        BACKWARD,
        BMM,
        *map(_bytes, (*BYTE_KINDS, STRIDED, STRIDED_CAST)),
        *(
            _by_two(name, ("elements", "bytes"), offsets_work)
            for name in (OFFSETS, OFFSETS_CAST, ACROSS, FAR)
        ),
        _by_two(JOINED, ("bytes", "largest"), joined_work),
        _by_two(CUMSUM_DOWN, ("bytes", "steps"), summed_work),
        *(_bytes(f"{kind}:{gpus}") for kind in COMMUNICATION for gpus in (2, 4, 8)),
    )
}
