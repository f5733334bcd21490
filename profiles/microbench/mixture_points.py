"""A decode step's mixture: few rows, of which most experts get none; latent attention beside it.

Rows are tokens × top_k, and `reached` experts have one at least: as many as picks at random reach,
E · (1 − (1 − k / E)ⁿ). Qwen1.5-MoE's and DeepSeek-V2-Lite's own sizes are held out.
"""

from __future__ import annotations

from collections.abc import Iterator

from profiles.microbench.gemm_points import HELD_OUT_ROUTERS, split_of
from profiles.microbench.point import OpPoint, Split

Mixture = tuple[int, int, int, int]
"""Experts, top_k, hidden size, width of an expert."""
CALIBRATION: tuple[Mixture, ...] = (
    (64, 8, 2048, 1024),  # OLMoE-1B-7B
    (128, 8, 2048, 768),  # Qwen3-30B-A3B
    (60, 4, 1536, 1280),
    (32, 4, 2880, 2880),  # gpt-oss-20b
)
HELD_OUT: tuple[Mixture, ...] = (
    (60, 4, 2048, 1408),  # Qwen1.5-MoE-A2.7B
    (64, 6, 2048, 1408),  # DeepSeek-V2-Lite
)
TOKENS = (1, 2, 4, 8, 16, 32)
ROUTED_TOKENS = (4, 16, 64)
ROUTERS = ((128, 2048), (64, 1536), (60, 1536), (1, 1536))

LATENTS = (
    (1, 32, 1024),
    (8, 32, 512),
    (4, 32, 4096),
    (32, 32, 1024),
    (16, 64, 2048),
    (4, 128, 1024),
)
"""Sequences, heads, tokens that are cached."""
HELD_OUT_LATENTS = ((8, 16, 1024), (16, 16, 1024))  # DeepSeek-V2-Lite
LATENT_WIDTH, LATENT_VALUES = 576, 512
MATRICES = ((4, 32, 128, 512), (16, 16, 64, 256), (2, 64, 128, 512))
HELD_OUT_MATRICES = ((8, 16, 128, 512),)
"""Sequences, heads, numbers of a head, of a latent."""


def reached(experts: int, top_k: int, tokens: int) -> int:
    """Experts that so many tokens reach in the mean, each picking at random."""
    return max(top_k, round(experts * (1.0 - (1.0 - top_k / experts) ** tokens)))


def few_rows_points() -> Iterator[OpPoint]:
    """Grouped products of both halves of an expert."""
    for mixture in (*CALIBRATION, *HELD_OUT):
        E, k, hidden, width = mixture
        split: Split = "held-out" if mixture in HELD_OUT else "calibration"
        for tokens in TOKENS:
            for n, inner in ((2 * width, hidden), (hidden, width)):
                shape = {"experts": E, "m": tokens * k, "n": n, "k": inner}
                shape["reached"] = reached(E, k, tokens)
                yield OpPoint(family="moe", op="grouped_mm", shape=shape, split=split)


def dealing_points() -> Iterator[OpPoint]:
    """What picks experts, sorts rows by them and puts them back."""
    for E, k, hidden, width in (*CALIBRATION[:2], *HELD_OUT):
        split: Split = "held-out" if (E, k, hidden, width) in HELD_OUT else "calibration"
        for tokens in ROUTED_TOKENS:
            picked = {"rows": tokens, "width": E, "top_k": k}
            yield _bytes("softmax", {"rows": tokens, "width": E}, split, "fp32")
            for op in ("topk", "sort", "histc", "gather_picks"):
                yield _bytes(op, picked, split, "fp32")
            for op in ("floor_divide", "searchsorted", "scatter_places", "put_places"):
                yield _bytes(op, picked, split, "int64")
            yield _bytes("index_rows", {"rows": tokens, "width": hidden, "top_k": k}, split)
            yield _bytes("sum_picks", {"rows": tokens, "width": hidden, "top_k": k}, split)
            yield _bytes("silu_half", {"rows": tokens * k, "width": width}, split)
            yield _bytes("mul_column", {"rows": tokens * k, "width": hidden}, split)
        yield _bytes("cumsum_counts", {"width": E}, split, "fp32")


def whole_mixture_points() -> Iterator[OpPoint]:
    """All kernels of a layer's experts, from scores to the sum."""
    for E, k, hidden, width in (*CALIBRATION, *HELD_OUT):
        split: Split = "held-out" if (E, k, hidden, width) in HELD_OUT else "calibration"
        for tokens in (1, 4, 8, 32):
            shape = {"experts": E, "rows": tokens, "top_k": k, "hidden": hidden, "width": width}
            shape["reached"] = reached(E, k, tokens)
            yield OpPoint(family="composite", op="experts", shape=shape, split=split)


def router_points() -> Iterator[OpPoint]:
    """Products with one column for each expert, or one in all."""
    for n, k in (*ROUTERS, *HELD_OUT_ROUTERS):
        for m in (4, 16, 64):
            shape = {"m": m, "n": n, "k": k}
            yield OpPoint(family="gemm", op="linear", shape=shape, split=split_of(n, k))


def latent_points() -> Iterator[OpPoint]:
    """Queries of all heads over one latent a token, and the products and copies on both sides."""
    for batch, heads, context in (*LATENTS, *HELD_OUT_LATENTS):
        split: Split = "held-out" if (batch, heads, context) in HELD_OUT_LATENTS else "calibration"
        shape = {"batch": batch, "heads": heads, "width": LATENT_WIDTH}
        shape |= {"values": LATENT_VALUES, "context": context}
        yield OpPoint(
            family="decode", op="sdpa_latent", shape=shape, backend="efficient", split=split
        )
    for matrices in (*MATRICES, *HELD_OUT_MATRICES):
        batch, heads, own, latent = matrices
        split = "held-out" if matrices in HELD_OUT_MATRICES else "calibration"
        for op, rows, width in (
            ("repeat_matrices", own, latent),
            ("repeat_matrices_t", latent, own),
        ):
            shape = {"batch": batch, "heads": heads, "rows": rows, "width": width}
            yield _bytes(op, shape, split)
            shape = {"batch": batch * heads, "m": 1, "n": width, "k": rows}
            yield OpPoint(family="gemm", op="bmm", shape=shape, split=split)


def _bytes(op: str, shape: dict[str, int], split: Split, dtype: str = "bf16") -> OpPoint:
    return OpPoint(family="bandwidth", op=op, shape=shape, dtype=dtype, split=split)
