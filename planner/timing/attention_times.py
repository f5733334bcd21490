"""Attention on the clock: by shape and kernel, in prefill, decode and on the way back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.catalog.gpus import Gpu
from planner.program import LATENT, Dims, Number, evaluate
from planner.timing.clock import OpTime, Speed, by_default, by_fit, computing_s
from planner.timing.compiled import three_reductions
from planner.timing.op_families import (
    LATENT_BLOCKS,
    LATENT_ROPE,
    MASKED,
    WIDE_QUERIES,
    triangle,
)
from planner.timing.op_kinds import (
    Attention,
    Timed,
)
from planner.timing.op_times import Fit


def attention_time(
    timed: Timed, kind: Attention, dims: Dims, speed: Speed, flops: Number, moved: Number
) -> OpTime:
    """One query a sequence is decode, more are prefill over as many causal pairs.

    A kernel that is given a mask takes longer for a pair than a causal one, and has its own fit.
    """
    calibration, B = speed.calibration, np.asarray(dims.batch, dtype=np.float64)
    pairs = np.asarray(kind.pairs_of(dims), dtype=np.float64)
    heads = (kind.heads, kind.kv_heads, kind.head_dim)
    if kind.backend == LATENT:  # a prompt's latents are opened for every head
        heads = (kind.heads, kind.heads, kind.head_dim)
    several = np.asarray(dims.tokens) > 1
    family = "attention_backward" if kind.backward else "prefill"
    backends = (kind.backend, *speed.backends) if kind.backend else speed.backends
    if kind.head_dim > WIDEST_HEAD and backends[:1] == ("cudnn",):
        backends = (EFFICIENT, *backends)
    parts: list[tuple[Number, Fit | None, tuple[Number, ...], str]] = []
    masked = np.asarray(kind.masked(dims)) & (speed.dtype != "fp32")  # one kernel in fp32
    for there in (masked, ~masked):
        if not np.any(there):
            continue
        first = (f"{MASKED}-{kind.backend}", MASKED, *backends) if there is masked else backends
        if kind.backward or np.any(several & there):
            fit = None if calibration is None else calibration.fit(family, speed.dtype, *first)
            parts.append((several & there, fit, (B, triangle(pairs), *heads), family))
        if not kind.backward and np.any(~several & there):
            held = pairs if kind.held is None else np.maximum(pairs, evaluate((kind.held,), dims))
            made_fit = _decode_fit(kind, first, B, held, speed)
            parts.append((~several & there, *made_fit, "decode"))
    if any(fit is None for _, fit, _, _ in parts):
        return by_default(timed, parts[0][3], speed.dtype, flops, moved, speed)
    hidden = pairs / np.maximum(np.asarray(kind.pairs.of(dims), dtype=np.float64), 1.0)
    computed = flops * hidden
    seconds: Number = 0.0
    clocked: Number = 0.0
    for where, fit, sizes, name in parts:
        assert fit is not None
        one, computing = fit.seconds(sizes), computing_s(fit, computed)
        if speed.fused and name == "decode":
            one = np.minimum(one, three_reductions(moved, speed))
        seconds = one if len(parts) == 1 else seconds + np.where(where, one, 0.0)
        clocked = computing if len(parts) == 1 else clocked + np.where(where, computing, 0.0)
    _, fit, sizes, family = parts[0]
    assert fit is not None
    made = by_fit(timed, family, fit, seconds, sizes, flops, moved, speed)
    return replace(made, clocked_s=np.minimum(made.seconds, clocked), computed_flops=computed)


EFFICIENT = "efficient"
WIDEST_HEAD = 256
"""Of flash and cuDNN's attention (sdp_utils.cpp: check_head_dim_size_flash)."""
EFFICIENT_QUERIES = 64
"""A block of the memory-efficient kernel has so many queries, be there one or all (fmha_cutlassF_…_
aligned_64x64, 64x128; aten/src/ATen/native/transformers/cuda/mem_eff_attention)."""
EFFICIENT_HEAD = 128
"""Wider heads have blocks of `WIDE_QUERIES`: fmha_cutlassF_…_aligned_32x128_gmem."""


def _decode_fit(
    kind: Attention, backends: tuple[str, ...], B: Number, pairs: Number, speed: Speed
) -> tuple[Fit | None, tuple[Number, ...]]:
    """The fit of one query's attention, and its sizes."""
    calibration, heads = speed.calibration, (kind.heads, kind.kv_heads, kind.head_dim)
    processors = speed.gpu.multiprocessors
    if calibration is None:
        return None, (B, pairs, *heads)
    if backends[:1] == (EFFICIENT,) and kind.head_dim > WIDEST_HEAD:
        blocks_fit = calibration.fit(LATENT_BLOCKS.name, speed.dtype)
        if blocks_fit is not None:
            blocks = whole_waves(B * np.ceil(kind.heads / WIDE_QUERIES), processors)
            return blocks_fit, (blocks, pairs, kind.head_dim + LATENT_ROPE / 2.0)
    if backends[:1] == (EFFICIENT,):
        fit = calibration.fit("prefill", speed.dtype, *backends)
        return fit, one_query_sizes(B, pairs, *heads, speed.gpu)
    if kind.backend == LATENT:
        dtype = "fp8" if kind.kv_bytes == 1 else speed.dtype
        latent = calibration.fit("latent_decode", dtype) or calibration.fit("latent_decode", "bf16")
        width = kind.head_dim + LATENT_ROPE / 2.0  # d_c + d_rope, of d_c + d_rope / 2
        if latent is not None:
            return latent, (B, pairs, float(kind.heads), width)
    fit = calibration.fit("decode", "fp8" if kind.kv_bytes == 1 else speed.dtype, *backends)
    return fit or calibration.fit("decode", speed.dtype, *backends), (B, pairs, *heads)


def one_query_sizes(
    B: Number, keys: Number, H: float, G: float, D: float, gpu: Gpu
) -> tuple[Number, ...]:
    """The prompts' attention that takes the efficient kernel as long as one query a sequence does.

    Its blocks are as large, and so many run at once that all processors have one. Heads wider than
    others' are over one latent, and share blocks as queries do.
    """
    queries = WIDE_QUERIES if D > EFFICIENT_HEAD else EFFICIENT_QUERIES
    together = H if D > WIDEST_HEAD else 1.0
    blocks = B * H / together * np.ceil(together / queries)
    waves = whole_waves(blocks, gpu.multiprocessors)
    each = (H / together, max(G / together, 1.0), D)
    return (waves / each[0], triangle(queries * keys), *each)


def whole_waves(blocks: Number, multiprocessors: int | None) -> Number:
    """Blocks that take as long: some of a wave take as long as all of it."""
    whole = multiprocessors or 1
    return np.ceil(blocks / whole) * whole
