"""Which products a GPU makes with 4-bit weights as they lie, without making the weight first.

bitsandbytes 0.50, backends/cuda/ops.py, gemm_4bit and _gemm_4bit_use_custom_cuda: thresholds that
its authors measured, here those of bf16. N outputs · K inputs; a wave is a block of 64 outputs on
each multiprocessor. The kernel itself is given no memory of its own (csrc/gemm_4bit.cu), so that
its output is all that torch allocates: read there, not measured.
"""

from __future__ import annotations

BLOCK = 64
ALWAYS_ROWS, MAX_ROWS = 4, 1536
SMALL_WEIGHT = 4 * 1024 * 1024


def multiplies_packed(
    rows: int, N: int, K: int, capability: str | None, multiprocessors: int
) -> bool:
    """Whether a product in bf16 reads the 4-bit weight itself, on a device of NVIDIA's."""
    if rows > MAX_ROWS or K % BLOCK:
        return False
    if rows <= ALWAYS_ROWS:
        return True
    assert capability is not None
    major, minor = (int(part) for part in capability.split("."))
    blocks, sms = -(-N // BLOCK), multiprocessors
    if major < 8:  # no tensor cores for bf16
        return rows < 8
    if major == 11 or (major, minor) == (8, 7):
        return False
    if major == 10:
        return rows <= _rows_of_blackwell(N, K, blocks, sms)
    if N * K < SMALL_WEIGHT:
        return rows <= _rows_of_small_weights(N, K, blocks, sms, (major, minor))
    if rows > 512:
        return False
    if rows < 8:
        return not _prefers_whole(rows, N, K, blocks, sms, (major, minor))
    match (major, minor):
        case (8, 0):
            return rows <= _rows_of_a100(N, K, blocks, sms)
        case (8, 6):
            return rows <= _by_waves(blocks, sms, ((1, 128), (0.5, 64)), 16)
        case (9, _):
            return rows <= _rows_of_hopper(N, K, blocks, sms)
        case (12, 0):
            return rows <= _rows_of_rtx_blackwell(N, K, blocks, sms)
        case (12, 1) if blocks >= sms:
            return rows <= 256
        case _:
            return rows <= _rows_of_ada(N, K, blocks, sms)


def _by_waves(blocks: int, sms: int, tiers: tuple[tuple[float, int], ...], least: int) -> int:
    """The rows of the first tier whose waves are filled; half a wave is rounded down."""
    return next((rows for waves, rows in tiers if blocks >= int(sms * waves)), least)


def _rows_of_blackwell(N: int, K: int, blocks: int, sms: int) -> int:
    """10.x: B200."""
    return _by_waves(blocks, sms, ((3, 32), (1, 0 if K >= N else 8)), 0)


def _rows_of_small_weights(
    N: int, K: int, blocks: int, sms: int, capability: tuple[int, int]
) -> int:
    """Weights below 4 Mi elements."""
    a100, hbm = capability == (8, 0), capability == (8, 0) or capability[0] == 9
    if 2 * K < N:
        if hbm:
            low = 3 * blocks < sms
            return (1536 if low else 512) if a100 else (512 if low else 320)
        return 192 if blocks < sms and blocks * K > 320 * sms else 320
    if 4 * blocks <= sms:
        if a100:
            return (32 if 8 * blocks <= sms else 128) if K >= N else 384
        return 32 if K < N or hbm else 23
    return 16 if 2 * blocks <= sms else 0


def _prefers_whole(
    rows: int, N: int, K: int, blocks: int, sms: int, capability: tuple[int, int]
) -> bool:
    """5 to 7 rows: shapes of memory-rich devices whose whole weight is faster."""
    a100, hopper = capability == (8, 0), capability[0] == 9
    if not (a100 or hopper) or rows < 6 or blocks < (36 if hopper else 48):
        return False
    below_three_quarters, below_three_fifths = 4 * blocks < 3 * sms, 5 * blocks < 3 * sms
    if K > N and below_three_quarters:
        return True
    if K != N:
        return False
    return below_three_fifths if a100 else below_three_quarters and not below_three_fifths


def _rows_of_a100(N: int, K: int, blocks: int, sms: int) -> int:
    if blocks >= sms:
        return 128 if blocks >= 3 * sms else 64 if K < N else 32
    if K >= 3 * N and 4 * blocks > sms:
        return 0
    if K == N and blocks >= 48 and 5 * blocks < 3 * sms:
        return 0
    if 2 * blocks < sms:
        if K <= N:
            return 128
        if 3 * blocks >= sms:
            return 0
    return 128 if blocks >= sms // 2 and K < N else 16


def _rows_of_hopper(N: int, K: int, blocks: int, sms: int) -> int:
    whole = K >= N and 4 * blocks < 3 * sms
    return _by_waves(blocks, sms, ((3, 64), (2, 48), (1, 32), (0.5, 0 if whole else 16)), 0)


def _rows_of_rtx_blackwell(N: int, K: int, blocks: int, sms: int) -> int:
    if 5 * blocks >= 4 * sms:
        return _by_waves(blocks, sms, ((3, 256), (2, 128)), 96 if K >= N else 64)
    if blocks >= sms // 2:
        return 64 if 2 * K >= N and blocks >= 128 else 8
    return 16 if K > 2 * N and blocks > 64 else 8


def _rows_of_ada(N: int, K: int, blocks: int, sms: int) -> int:
    """8.9, 12.1 below a wave, and what is not known."""
    tall = K > 2 * N
    if 5 * blocks >= 4 * sms:
        near = 128 if tall or blocks >= 200 else 64
        if near == 64 and K >= N:
            near = 128 if sms >= 60 else 32
        return _by_waves(blocks, sms, ((3, 256), (2, 128)), near)
    if blocks >= sms // 2:
        return 64 if tall else 8 if blocks >= 64 else 32
    if K > N and blocks <= 48:
        return 12 if K >= 3 * N else 10
    return 16 if tall or blocks < 48 else 8
