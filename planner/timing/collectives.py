"""What GPUs say to one another: collectives by size, and the time that fully_shard's leave exposed.

FSDP2 gathers a layer while the one before computes, and reduces a layer's gradients while the next
one computes (torch/distributed/fsdp/_fully_shard: _fsdp_param_group.py, _fsdp_state.py). One
communicator carries both: its collectives follow one another.

    forward    layer i is gathered from the moment layer i − 1 begins, and begins when that is done
    backward   the layer ahead is gathered from the moment a layer begins, gradients are reduced
               from the moment it ends
    optimizer  begins when the last gradients are there

Copies into and out of what is gathered are kernels of the pass. What collectives take from the
kernels beside them (multiprocessors, bandwidth) was not measured and is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from planner.catalog.gpus import Gpu
from planner.program import Dims, Number, Program, Segment, evaluate
from planner.timing.clock import Speed
from planner.timing.op_kinds import COLLECTIVES
from planner.timing.roofline import Cost, pass_cost

GATHER, REDUCE = COLLECTIVES
MEASURED = (2, 4, 8)
"""GPUs of one host among which collectives were timed."""
DEFAULT_LINK_SHARE = 0.5
"""Of the interconnect's one-way rate that a ring reaches where nobody measured it."""
DEFAULT_HOP_S = 6e-6
"""One exchange of a few bytes between two GPUs where nobody measured it."""
SMALLEST_BYTES = 256.0


def collective_seconds(
    kind: str, size: Number, gpus: int, speed: Speed, how: str = ""
) -> tuple[Number, float]:
    """Seconds of one, and how far they may be off as a share.

    `size`: bytes of all parts together. Where it was not timed, a ring's (N − 1) / N of them over
    the link, of an all-reduce twice.
    """
    known = next((n for n in MEASURED if gpus <= n), None)
    if speed.calibration is not None and known is not None:
        fits = speed.calibration.fits
        fit = fits.get(f"{kind}:{known}{how}") or fits.get(f"{kind}:{known}")
        if fit is not None:
            return fit.seconds((np.maximum(size, SMALLEST_BYTES),)), 0.1
    turns = 2.0 if kind == "all_reduce" else 1.0
    ring = turns * (gpus - 1) / gpus * size / link_bytes_per_s(speed.gpu)
    return DEFAULT_HOP_S * np.log2(gpus) + ring, 0.5


def link_bytes_per_s(gpu: Gpu) -> float:
    """One way of the interconnect, at the share that is reached; PCIe 4.0 where none is known."""
    both = gpu.interconnect_bytes_per_s or 64e9
    return DEFAULT_LINK_SHARE * both / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A segment, once: weights that are gathered around it, its kernels, what it reduces."""

    gather_s: float
    cost: Cost
    reduce_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Lanes:
    """A phase as turns in order, each so often in a row; `backward`: gathered is the one ahead."""

    turns: tuple[tuple[Turn, int], ...]
    backward: bool

    @property
    def communication_s(self) -> float:
        """All collectives, one after the other."""
        return sum(n * (turn.gather_s + turn.reduce_s) for turn, n in self.turns)

    def seconds(self, clock: Number) -> Number:
        """Until kernels and collectives are done, with kernels at this clock."""
        kernels_s = said_s = begun_s = ready_s = 0.0
        for turn, n in self.turns:
            cost_s = float(turn.cost.seconds(clock))
            for _ in range(n):
                if self.backward:
                    begun_s = max(kernels_s, ready_s)
                    if turn.gather_s:
                        ready_s = said_s = max(said_s, begun_s) + turn.gather_s
                elif turn.gather_s:
                    said_s = max(said_s, begun_s) + turn.gather_s
                    begun_s = max(kernels_s, said_s)
                else:
                    begun_s = kernels_s
                kernels_s = begun_s + cost_s
                if turn.reduce_s:
                    said_s = max(said_s, kernels_s) + turn.reduce_s
        return max(kernels_s, said_s)


def lanes_of(
    program: Program, dims: Dims, speed: Speed, shards: int, *, backward: bool
) -> Lanes | None:
    """A phase's collectives among so many GPUs beside its kernels; None: there are none."""
    if not any(op.kernel in COLLECTIVES for segment in program.segments for op in segment.ops):
        return None
    turns = tuple(
        (_turn(segment, dims, speed, shards), segment.count) for segment in program.segments
    )
    return Lanes(turns=turns, backward=backward)


def _turn(segment: Segment, dims: Dims, speed: Speed, shards: int) -> Turn:
    once = Program(name=segment.label, segments=(replace(segment, count=1),))
    sizes = dict.fromkeys(COLLECTIVES, 0.0)
    for kernel, size in collectives(segment, dims, shards):
        sizes[kernel] += float(collective_seconds(kernel, size, shards, speed)[0])
    return Turn(gather_s=sizes[GATHER], cost=pass_cost(once, dims, speed), reduce_s=sizes[REDUCE])


def collectives(segment: Segment, dims: Dims, shards: int) -> Iterator[tuple[str, float]]:
    """Those of a segment, once: kernel, and bytes of all parts together."""
    for op in segment.ops:
        if op.kernel in COLLECTIVES:
            written = float(sum(evaluate(shape, dims) for shape in op.moved))
            yield op.kernel, written if op.kernel == GATHER else shards * written
