"""Tiles of grouped products: rows that differ from expert to expert fill them worse than even ones.

Ops were timed with as many rows for every expert. How long others take is read off the fit at the
rows, dealt out in turn, that fill as many tiles: those of a tile are computed, there or not.
"""

from __future__ import annotations

import numpy as np

from planner.program import Dims, Number, evaluate
from planner.timing.op_kinds import Grouped

GROUPED_TILES = (64, 256)
"""Rows of an expert's that a thread block of torch's computes together, or a cluster of two; the
first up to `SMALL_GROUP` rows an expert in the mean (ATen/native/cuda/GroupMM.cu:
dispatch_bf16_grouped_kernel_on_tile_size)."""
SMALL_GROUP = 128
FUSED_TILES = ((32, 16), (96, 32), (512, 64))
"""Rows of a tile up to so many tokens, else 128 (vLLM, layers/fused_moe/fused_moe.py:
get_default_config; cards that have a tuned file of their own differ)."""
LARGEST_TILE = 128


def rows_of_tiles(kind: Grouped, dims: Dims, *, torch_groups: bool) -> Number:
    """Rows dealt out in turn that fill as many tiles as those of `dims` do, in expectation.

    Timed was a tile of each expert's own up to its size, filled in part, and whole ones beyond: of
    every expert, or (`torch_groups`: torch's own kernel runs) of those that are reached; of its
    large tiles whole ones alone.
    """
    rows, routing, of = evaluate(kind.m, dims), dims.routing, kind.reached
    if routing.balanced and not torch_groups:
        return rows
    tokens = np.asarray(dims.batch * dims.tokens, dtype=np.float64)
    large = torch_groups & (rows > SMALL_GROUP * of.experts)
    tile = np.where(large, *GROUPED_TILES[::-1]) if torch_groups else fused_tile(tokens)
    timed = of.of(dims) if torch_groups else of.experts
    own = np.where(large, 0.0, np.minimum(rows, timed))
    tiles = routing.tiles(of.experts, of.top_k, tokens, tile)
    return filled_rows(rows, tiles, tile, own)


def filled_rows(rows: Number, tiles: Number, tile: Number, own: Number) -> Number:
    """Rows dealt out in turn that fill so many tiles; of them `own` experts have one at least."""
    return rows * tiles / np.maximum(own, rows / tile)


def fused_tile(tokens: Number) -> Number:
    """Rows of a tile of a compiler's kernel."""
    tile: Number = LARGEST_TILE
    for most, rows in FUSED_TILES[::-1]:
        tile = np.where(tokens <= most, rows, tile)
    return tile
