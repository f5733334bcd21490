"""Many workloads at once: the rules of one estimate, over arrays of batches and contexts.

Everything here is asked of the same `Prepared` that an estimate asks; only sizes are float64
arrays, exact below 2⁵³. The output length is one number, so that passes are the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.activations import peak_bytes
from planner.latency import BASIS, times
from planner.ledger import total_bytes
from planner.parallel import Share
from planner.prepared import Prepared
from planner.program import Number, maximum
from planner.runtimes.base import Pool
from planner.runtimes.transformers import is_quantised
from planner.workload import Inference

Cells = NDArray[np.float64]


class Workloads(Inference):
    """Inferences whose batch and prompt are arrays of one shape."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Checked where the grid is made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grid:
    """What every cell needs of one GPU, the fullest; as `Memory` and `Estimate` have it.

    `kv_pool_bytes` and `kv_pool_tokens` are those of vllm, the same in all cells.
    """

    weights_bytes: int
    overhead_bytes: int
    kv_cache_bytes: Cells
    activations_bytes: Cells
    total_bytes: Cells
    peak_live_bytes: Cells
    headroom_bytes: Cells
    fits: NDArray[np.bool_]
    kv_pool_bytes: int | None
    kv_pool_tokens: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """TTFT, TPOT (nan where nothing is decoded) and output tokens per second of every cell."""

    ttft_s: Cells
    tpot_s: Cells
    output_tokens_per_s: Cells
    basis: str = BASIS


def takes_arrays(prepared: Prepared) -> bool:
    """Whether the rules take arrays: the steps of a quantised cache differ by size."""
    return prepared.runtime.name != "transformers" or not is_quantised(prepared.setting)


def memory_grid(prepared: Prepared, work: Workloads) -> Grid:
    """Memory of every cell. Contexts that an estimate would refuse have to be left out before."""
    built = [_of_share(prepared, share, work) for share in prepared.shares()]
    return min(built, key=lambda part: part[0])[1]


def _of_share(
    prepared: Prepared, share: Share, work: Workloads
) -> tuple[tuple[int, int, int], Grid]:
    """What is left of a pool, to find the worst share (one without a pool is alone); the cells."""
    shape = np.broadcast_shapes(np.shape(work.batch), np.shape(work.prompt_tokens))

    def cells(value: Number) -> Cells:
        return np.broadcast_to(np.asarray(value, dtype=np.float64), shape)

    weights, overhead = (total_bytes(rows) for rows in prepared.fixed_rows(share))
    kv = cells(total_bytes(prepared.cache_rows(share, work)))
    live: Number = 0
    for phase in prepared.phases(share, work):
        live = maximum(live, peak_bytes(phase.program, phase.dims))
    live = cells(live)
    activations = live if prepared.apart else live - kv
    total = weights + kv + activations + overhead
    held = weights + int(activations.flat[0]) if prepared.runtime.pooled and live.size else weights
    pool = prepared.pool(share, held_bytes=held)
    room = _room(prepared, pool, total=total, kv=kv)
    served = room >= 0
    if pool is not None:
        served = served & (cells(work.batch) <= prepared.setting.max_sequences)
    grid = Grid(
        weights_bytes=weights,
        overhead_bytes=overhead,
        kv_cache_bytes=kv,
        activations_bytes=activations,
        total_bytes=total,
        peak_live_bytes=weights + (live + kv if prepared.apart else live),
        headroom_bytes=room,
        fits=served,
        kv_pool_bytes=None if pool is None else pool.size_bytes,
        kv_pool_tokens=None if pool is None else pool.tokens,
    )
    order = (0, 0, 0) if pool is None else (1, pool.blocks, pool.available_bytes)
    return order, grid


def _room(prepared: Prepared, pool: Pool | None, *, total: Cells, kv: Cells) -> Cells:
    """As Estimate.headroom_bytes."""
    if pool is None:
        return prepared.gpu.memory_bytes - total
    return (pool.size_bytes or pool.available_bytes) - kv


def time_grid(prepared: Prepared, work: Workloads) -> Times:
    """Times of every cell by the plain roofline."""
    shape = np.broadcast_shapes(np.shape(work.batch), np.shape(work.prompt_tokens))
    made: Any = times(prepared.model, work, prepared.setting, prepared.runtime.name, prepared.gpu)
    nothing = np.full(shape, np.nan)
    return Times(
        ttft_s=np.broadcast_to(made.ttft_s, shape),
        tpot_s=nothing if made.tpot_s is None else np.broadcast_to(made.tpot_s, shape),
        output_tokens_per_s=np.broadcast_to(made.output_tokens_per_s, shape),
        basis=made.basis,
    )


MEMORY_COLUMNS = tuple(f.name for f in fields(Grid))
