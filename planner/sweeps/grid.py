"""Many workloads at once: the rules of one estimate, over arrays of batches and contexts.

Everything here is asked of the same `Prepared` that an estimate asks; only sizes are float64
arrays, exact below 2⁵³. The output length is one number, so that passes are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from planner.activations import peak_bytes
from planner.ledger import total_bytes
from planner.model import Model
from planner.parallel import Share
from planner.prepared import Prepared
from planner.program import Number, maximum
from planner.runtimes.base import Pool
from planner.runtimes.transformers import is_quantised, is_static
from planner.timing.latency import UNCALIBRATED, times
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
    basis: str = UNCALIBRATED


def takes_arrays(prepared: Prepared) -> bool:
    """Whether the rules take arrays: the steps of quantised and static caches differ by size."""
    setting = prepared.setting
    if setting.cache is not None and setting.cache.kind == "quantised":
        return False
    return prepared.runtime.name != "transformers" or not (
        is_quantised(setting) or is_static(setting)
    )


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
    live = np.zeros(shape)
    for place, part in _alike(prepared, share.model, work, shape):
        for phase in prepared.phases(share, part):
            live[place] = maximum(live[place], peak_bytes(phase.program, phase.dims))
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


def _alike(
    prepared: Prepared, model: Model, work: Workloads, shape: tuple[int, ...]
) -> Iterator[tuple[Any, Workloads]]:
    """Cells whose sizes run the same programs: where they are, and their workloads."""
    codes = np.broadcast_to(prepared.runtime.alike(model, work), shape)
    found = np.unique(codes)
    if len(found) <= 1:
        yield ..., work
        return
    batch, prompt = (np.broadcast_to(x, shape) for x in (work.batch, work.prompt_tokens))
    for code in found:
        place = codes == code
        yield place, replace(work, batch=batch[place], prompt_tokens=prompt[place])


def _room(prepared: Prepared, pool: Pool | None, *, total: Cells, kv: Cells) -> Cells:
    """As Estimate.headroom_bytes."""
    if pool is None:
        return prepared.gpu.memory_bytes - total
    return (pool.size_bytes or pool.available_bytes) - kv


def time_grid(prepared: Prepared, work: Workloads) -> Times:
    """Times of every cell, as an estimate has them."""
    shape = np.broadcast_shapes(np.shape(work.batch), np.shape(work.prompt_tokens))
    ttft, tpot, speed = (np.full(shape, np.nan) for _ in range(3))
    for place, part in _alike(prepared, prepared.model, work, shape):
        made: Any = times(
            prepared.model, part, prepared.setting, prepared.runtime.name, prepared.gpu
        )
        ttft[place], speed[place] = made.ttft_s, made.output_tokens_per_s
        if made.tpot_s is not None:
            tpot[place] = made.tpot_s
    basis = made.basis if ttft.size else UNCALIBRATED
    return Times(ttft_s=ttft, tpot_s=tpot, output_tokens_per_s=speed, basis=basis)


MEMORY_COLUMNS = tuple(f.name for f in fields(Grid))
