"""What lives at every op of a workload's passes, in order: the peak with its surroundings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.program import Buffer
from planner.runtimes.base import Phase

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True, slots=True)
class Moment:
    """One op that allocates: what lives while it runs, and after what it frees is gone.

    `cache_bytes`, `gradient_bytes` (finished gradients of parameters) and `activation_bytes` add up
    to what the pass has made by then; `layer` is None outside the blocks.
    """

    phase: str
    layer: int | None
    op: str
    cache_bytes: int
    gradient_bytes: int
    activation_bytes: int
    after_bytes: int

    @property
    def live_bytes(self) -> int:
        """Storages of the pass that live while the op runs."""
        return self.cache_bytes + self.gradient_bytes + self.activation_bytes


def moments(phase: Phase) -> Iterator[Moment]:
    """Every op of a pass that allocates, each layer for itself.

    Frees between two of them belong to the one before. The largest `live_bytes` is the peak of
    `activations.peak`.
    """
    live = {"cache": 0, "gradient": 0, "activation": 0}
    sizes: dict[Buffer, int] = {}

    def change(buffers: Iterable[Buffer], sign: int) -> None:
        for buffer in buffers:
            if buffer not in sizes:
                sizes[buffer] = buffer.nbytes(phase.dims)
            kind = "cache" if buffer.cache else "gradient" if buffer.gradient else "activation"
            live[kind] += sign * sizes[buffer]

    waiting: tuple[str, str, int | None, dict[str, int]] | None = None
    for segment in phase.program.segments:
        for repetition in range(segment.count):
            first = segment.first_layer
            layer = None if first is None else first + segment.layer_step * repetition
            for op in segment.ops:
                if op.allocates:
                    if waiting is not None:
                        yield _moment(waiting, sum(live.values()))
                    change(op.allocates, +1)
                    waiting = (segment.phase or phase.name, op.name, layer, dict(live))
                change(op.frees, -1)
    if waiting is not None:
        yield _moment(waiting, sum(live.values()))


def _moment(seen: tuple[str, str, int | None, dict[str, int]], after_bytes: int) -> Moment:
    phase, op, layer, live = seen
    return Moment(
        phase=phase,
        layer=layer,
        op=op,
        cache_bytes=live["cache"],
        gradient_bytes=live["gradient"],
        activation_bytes=live["activation"],
        after_bytes=after_bytes,
    )


def timeline_table(phases: Iterable[Phase], *, weights_bytes: int) -> pd.DataFrame:
    """A row an op: phase, layer, op, live_bytes, weights_bytes, cache_bytes, gradient_bytes,
    activation_bytes, after_bytes, peak.

    `live_bytes` (while the op runs) and `after_bytes` include the weights; `peak` is true where
    live_bytes first reaches its largest value.
    """
    import pandas as pd

    rows = [moment for phase in phases for moment in moments(phase)]
    live = [weights_bytes + moment.live_bytes for moment in rows]
    table = pd.DataFrame(
        {
            "phase": [m.phase for m in rows],
            "layer": pd.array([m.layer for m in rows], dtype="Int64"),
            "op": [m.op for m in rows],
            "live_bytes": live,
            "weights_bytes": weights_bytes,
            "cache_bytes": [m.cache_bytes for m in rows],
            "gradient_bytes": [m.gradient_bytes for m in rows],
            "activation_bytes": [m.activation_bytes for m in rows],
            "after_bytes": [weights_bytes + m.after_bytes for m in rows],
            "peak": False,
        }
    )
    if live:
        table.loc[live.index(max(live)), "peak"] = True
    return table
