"""fp16 beside bf16, float32, biases: the same sizes in another dtype or with another epilogue."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from profiles.microbench import attention_points, gemm_points
from profiles.microbench.attention_points import PHI_2, Heads
from profiles.microbench.point import OpPoint, Split

HALF_PAIRS = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (3584, 3584))
BIAS_PAIRS = ((4096, 4096), (14336, 4096), (4096, 14336), (18944, 3584))
BIAS_M = (4, 512, 4096)
FP32_PAIRS = ((4096, 4096), (2048, 2048), (3072, 768), (768, 3072), (2304, 768))
FP32_M = (1, 64, 1024, 4096)

HEADS_OF_80: tuple[Heads, ...] = ((16, 16, 80), (40, 40, 80))
PREFILL_OF_80 = ((1, 512), (1, 2048), (4, 1024))
ROTARY = ((16, 128, 32), (16, 64, 16), (40, 80, 32))
HELD_OUT_ROTARY = ((32, 80, 32), (32, 128, 32))  # phi-2, Pythia-6.9B
WIDTHS, HELD_OUT_WIDTHS = (8192, 12288), (10240, 16384)  # phi-2, Pythia-6.9B
SQUARE = 8192
FP32_SQUARE = 4096


def half_gemm_points() -> Iterator[OpPoint]:
    """fp16 where bf16 was timed, and the square that runs for more than a second."""
    for point in gemm_points.gemm_points():
        pair = (point.shape["n"], point.shape["k"])
        if point.op == "linear" and pair in HALF_PAIRS:
            yield replace(point, dtype="fp16")
    yield _gemm("linear", SQUARE, SQUARE, SQUARE, "fp16")


def bias_points() -> Iterator[OpPoint]:
    """With a bias, which a product adds as it ends."""
    for n, k in BIAS_PAIRS:
        for m in BIAS_M:
            for dtype in ("bf16", "fp16"):
                yield _gemm("linear_bias", m, n, k, dtype)


def fp32_gemm_points() -> Iterator[OpPoint]:
    """float32 without tf32."""
    for n, k in FP32_PAIRS:
        for m in FP32_M:
            yield _gemm("linear", m, n, k, "fp32")


def half_attention_points() -> Iterator[OpPoint]:
    """Heads of 80, which kernels pad, in fp16; then heads that were timed in bf16."""
    for heads in (*HEADS_OF_80, PHI_2):
        for batch, tokens in PREFILL_OF_80:
            for backend in ("flash", "cudnn"):
                yield _prefill(heads, batch, tokens, backend)
    for heads in (attention_points.LLAMA, (32, 32, 128)):
        for batch, tokens in ((1, 2048), (4, 1024)):
            for backend in ("flash", "cudnn"):
                yield _prefill(heads, batch, tokens, backend)


def half_byte_points() -> Iterator[OpPoint]:
    """Rotations of a part of each head, and activations of plain feed-forwards."""
    for heads, head_dim, rotary in (*ROTARY, *HELD_OUT_ROTARY):
        split: Split = "held-out" if (heads, head_dim, rotary) in HELD_OUT_ROTARY else "calibration"
        for batch, tokens in ((4, 1), (1, 1024), (4, 1024)):
            shape = {"batch": batch, "tokens": tokens, "heads": heads, "kv_heads": heads}
            shape |= {"head_dim": head_dim, "rotary": rotary}
            yield OpPoint(
                family="bandwidth", op="rope_partial", shape=shape, dtype="fp16", split=split
            )
    for width in (*WIDTHS, *HELD_OUT_WIDTHS):
        split = "held-out" if width in HELD_OUT_WIDTHS else "calibration"
        for op in ("gelu", "gelu_new"):
            for rows in (8, 1024, 4096):
                shape = {"rows": rows, "width": width}
                yield OpPoint(family="bandwidth", op=op, shape=shape, dtype="fp16", split=split)


def half_ceiling_points() -> Iterator[OpPoint]:
    """A large product in fp32, in a burst."""
    yield OpPoint(family="ceiling", op="linear", shape=_square(FP32_SQUARE), dtype="fp32")


def half_sustained_points() -> Iterator[OpPoint]:
    """More than a second of products whose joules a FLOP may differ from bf16's."""
    yield OpPoint(family="sustained", op="linear", shape=_square(SQUARE), dtype="fp16")
    yield OpPoint(family="sustained", op="linear", shape=_square(FP32_SQUARE), dtype="fp32")
    yield OpPoint(family="sustained", op="linear", shape=_square(FP32_SQUARE), dtype="bf16")


def _square(size: int) -> dict[str, int]:
    return {"m": size, "n": size, "k": size}


def _gemm(op: str, m: int, n: int, k: int, dtype: str) -> OpPoint:
    shape = {"m": m, "n": n, "k": k}
    split = gemm_points.split_of(n, k)
    return OpPoint(family="gemm", op=op, shape=shape, dtype=dtype, split=split)


def _prefill(heads: Heads, batch: int, tokens: int, backend: str) -> OpPoint:
    shape = attention_points.shape_of(heads, batch, tokens, tokens)
    split = attention_points.split_of(heads)
    return OpPoint(
        family="prefill", op="sdpa", shape=shape, dtype="fp16", backend=backend, split=split
    )
