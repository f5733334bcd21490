"""Matrix products: the linear layers of real models, split by (n, k).

A linear layer is y[m, n] = x[m, k] · Wᵀ. Each (n, k) takes every third m of the grid, shifted from
pair to pair, so that all m are met without 25 × 22 points.
"""

from __future__ import annotations

from collections.abc import Iterator

from profiles.microbench.point import OpPoint, Split

M_GRID = (1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 768, 1024, 2048)
M_LARGE = (3072, 4096, 6144, 8192, 12288, 16384)

CALIBRATION = (
    (4096, 4096),  # Llama-3.1-8B, Mistral-7B: q, o
    (14336, 4096),  # gate, up
    (4096, 14336),  # down
    (1024, 4096),  # k, v
    (128256, 4096),  # Llama-3.1-8B: head
    (6144, 4096),  # qkv in one
    (28672, 4096),  # gate and up in one
    (32768, 4096),  # Mistral-7B: head
    (2048, 2048),
    (8192, 8192),
    (16384, 16384),
    (768, 768),  # GPT-2: c_proj
    (3072, 768),  # GPT-2: c_fc
    (768, 3072),
    (1536, 2048),  # a Qwen3-30B-A3B expert: gate and up
    (2048, 768),  # its down
    (512, 512),
    (2048, 8192),  # Llama-3.2-1B: down
)
HELD_OUT = (
    (3584, 3584),  # Qwen2.5-7B: q, o
    (18944, 3584),  # gate, up
    (3584, 18944),  # down
    (512, 3584),  # k, v
    (152064, 3584),  # head
    (14336, 3584),  # Gemma-2-9B: gate, up
    (3584, 14336),  # down
    (4096, 3584),  # q
    (2304, 768),  # GPT-2: c_attn
    (50257, 768),  # head: odd
    (2816, 2048),  # a DeepSeek-V2-Lite expert: gate and up
    (1024, 1024),
)
HELD_OUT_ROUTERS = (
    (60, 2048),  # Qwen1.5-MoE-A2.7B
    (1, 2048),  # its shared expert's gate
    (64, 2048),  # DeepSeek-V2-Lite
)
UNALIGNED = (
    (32001, 4096),  # a vocabulary with one token added
    (50259, 1024),
    (50258, 1024),  # even: rows of 4-byte alignment
    (50260, 1024),  # 8-byte
    (51201, 2048),
    (4096, 4097),
)
"""Rows that do not begin at 16 bytes: tensor cores are fed by other kernels then."""
UNALIGNED_M = (1, 8, 64, 512, 2048, 8192)

FP8_PAIRS = ((14336, 4096), (4096, 14336), (6144, 4096), (18944, 3584), (3584, 18944))
FP8_M = (1, 16, 64, 128, 512, 2048, 8192)

CPU_CALIBRATION = (
    (512, 512),
    (2048, 512),
    (512, 2048),
    (1024, 1024),
    (4096, 1024),
    (768, 768),
    (24576, 512),
    (40960, 768),
    (256, 512),
    (768, 3072),
    (4864, 896),
    (50304, 768),
)
CPU_HELD_OUT = ((384, 384), (1536, 384), (640, 640), (3072, 768), (28672, 640))
CPU_M = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 256, 512, 1024)
"""2 and 3: rows that a CPU's libraries multiply slower than 4, over a vocabulary's weights most."""
LARGEST_CPU_FLOPS = 5e9

LARGEST_FLOPS = 5e12
"""No point takes longer than about 8 ms where 650 TFLOP/s are reached."""


def split_of(n: int, k: int) -> Split:
    """Whether a fit may see products with these weights."""
    return "held-out" if (n, k) in (*HELD_OUT, *HELD_OUT_ROUTERS, *CPU_HELD_OUT) else "calibration"


def gemm_points() -> Iterator[OpPoint]:
    """bf16 over every pair, then fp8 over a few, then rows that begin anywhere."""
    grid = M_GRID + M_LARGE
    pairs = [pair for both in _alternate(CALIBRATION, HELD_OUT) for pair in both]
    for shift, (n, k) in enumerate(pairs):
        for m in grid[shift % 3 :: 3]:
            if 2 * m * n * k <= LARGEST_FLOPS and m * n * 2 <= 2**31:
                yield _point("linear", m, n, k, "bf16")
    for n, k in FP8_PAIRS:
        for m in FP8_M:
            yield _point("scaled_mm", m, n, k, "fp8")
    for n, k in UNALIGNED:
        for m in UNALIGNED_M:
            yield _point("linear", m, n, k, "bf16")


def cpu_gemm_points() -> Iterator[OpPoint]:
    """fp32 at sizes a CPU does in milliseconds."""
    for n, k in (*CPU_CALIBRATION, *CPU_HELD_OUT):
        for m in CPU_M:
            if 2 * m * n * k <= LARGEST_CPU_FLOPS:
                yield _point("linear", m, n, k, "fp32")


def moe_points() -> Iterator[OpPoint]:
    """All experts of a layer in one grouped product; m is tokens × top_k, dealt out evenly."""
    for experts, n, k in ((128, 1536, 2048), (128, 2048, 768), (8, 28672, 4096), (64, 2816, 2048)):
        for m in (8, 64, 512, 4096, 32768):
            if 2 * m * n * k <= LARGEST_FLOPS:
                shape = {"experts": experts, "m": m, "n": n, "k": k}
                yield OpPoint(family="moe", op="grouped_mm", shape=shape, split=split_of(n, k))


def _point(op: str, m: int, n: int, k: int, dtype: str) -> OpPoint:
    shape = {"m": m, "n": n, "k": k}
    return OpPoint(family="gemm", op=op, shape=shape, dtype=dtype, split=split_of(n, k))


def _alternate(
    a: tuple[tuple[int, int], ...], b: tuple[tuple[int, int], ...]
) -> Iterator[tuple[tuple[int, int], ...]]:
    for i in range(max(len(a), len(b))):
        yield (*a[i : i + 1], *b[i : i + 1])
