"""A Mamba-2 scan's kernels, at sizes of a few heads and chunks; a model's own are held out.

Shapes are (batch, chunks, chunk, heads, head_dim, state): Bamba-9B has 128 heads of 64 over a state
of 128 in chunks of 256.
"""

from __future__ import annotations

from collections.abc import Iterator

from profiles.microbench.point import OpPoint, Split

Scan = tuple[int, int, int, int, int, int]
NAMES = ("batch", "chunks", "chunk", "heads", "head_dim", "state")
CALIBRATION: tuple[Scan, ...] = (
    (2, 1, 256, 32, 64, 128),
    (1, 4, 256, 64, 64, 64),
    (3, 2, 256, 80, 64, 128),
    (2, 6, 128, 96, 64, 128),
)
HELD_OUT: tuple[Scan, ...] = ((4, 2, 256, 128, 64, 128), (1, 3, 256, 128, 64, 128))
CONVOLUTIONS = ((1, 1024, 4352), (3, 512, 5376), (2, 1536, 6400), (8, 256, 2304))
HELD_OUT_CONVOLUTIONS = ((4, 512, 8448), (1, 2048, 8448))  # Bamba-9B
CONVOLUTION_KERNEL = 4


def scan_points() -> Iterator[OpPoint]:
    """All kernels of each scan, then its convolutions."""
    for scan in (*CALIBRATION, *HELD_OUT):
        yield from kernel_points(scan, "held-out" if scan in HELD_OUT else "calibration")
    for batch, tokens, channels in (*CONVOLUTIONS, *HELD_OUT_CONVOLUTIONS):
        held_out = (batch, tokens, channels) in HELD_OUT_CONVOLUTIONS
        shape = {"batch": batch, "tokens": tokens, "channels": channels}
        shape["kernel"] = CONVOLUTION_KERNEL
        split: Split = "held-out" if held_out else "calibration"
        for op in ("conv1d", "silu_cut"):
            yield OpPoint(family="bandwidth", op=op, shape=shape, split=split)


def whole_scan_points() -> Iterator[OpPoint]:
    """Each scan from its first kernel to its last."""
    for scan in (*CALIBRATION, *HELD_OUT):
        shape = dict(zip(NAMES, scan, strict=True))
        split: Split = "held-out" if scan in HELD_OUT else "calibration"
        yield OpPoint(family="composite", op="chunk_scan", shape=shape, split=split)


def kernel_points(scan: Scan, split: Split) -> Iterator[OpPoint]:
    """Each kind of kernel of a scan, once."""
    B, C, L, H, D, N = scan
    heads = {"batch": B, "chunks": C, "chunk": L, "heads": H}
    for op in ("mask_expanded", "mask_pairs", "cumsum_pairs", "cumsum_tokens", "mul_pairs"):
        yield _bytes(op, heads, split)
    for op in ("clone_heads", "clone_across", "mul_decays"):
        yield _bytes(op, {**heads, "head_dim": N}, split)
    for op in ("clone_heads", "clone_turned", "add_turned", "mul_steps", "mul_heads"):
        yield _bytes(op, {**heads, "head_dim": D}, split)
    yield _bytes("clone_t", {"batch": B * C * H, "rows": D, "width": N}, split)
    yield _bytes("repeat_heads", {**heads, "head_dim": N}, split)
    for pad in (0, L // 2):
        shape = {"batch": B, "tokens": C * L - pad, "heads": H, "head_dim": N, "pad": pad}
        yield _bytes("pad_tokens", shape, split)
    yield _bytes("exp", {"rows": B * H * C * L, "width": L}, split)
    yield _bytes("mul_column", {"rows": B * C * L * H, "width": D}, split)
    for m, n, k in (
        (L, L, N),  # C · Bᵀ
        (L, D, L),  # scores · x
        (D, N, L),  # xᵀ · B
        (L, D, N),  # C · states
    ):
        shape = {"batch": B * C * H, "m": m, "n": n, "k": k}
        yield OpPoint(family="gemm", op="bmm", shape=shape, dtype="fp32", split=split)
    between = {"batch": B * H, "m": C + 1, "n": D * N, "k": C + 1}
    yield OpPoint(family="gemm", op="bmm", shape=between, dtype="fp32", split=split)


def _bytes(op: str, shape: dict[str, int], split: Split) -> OpPoint:
    return OpPoint(family="bandwidth", op=op, shape=shape, dtype="fp32", split=split)
