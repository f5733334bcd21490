"""Parameters divided among data-parallel GPUs: torch's FSDP2, torch.distributed.fsdp.fully_shard.

The decoder layers and the root are each a group. Dimension 0 of every parameter is cut into as many
chunks as there are shards (_fsdp_param.py, _init_sharded_param): a rank has ceil(d₀ / N) rows, the
last ones fewer or none, filled up with zeros. Counted is the first rank, whose rows are all real:
its gradients and optimizer states are the largest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

from planner.dtypes import element_bytes
from planner.ledger import Row, parameter_rows
from planner.model import Model
from planner.tensors import Parameter

Resharded: TypeAlias = Literal["all", "all-but-last", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How parameters are sharded and gathered.

    `held_dtype`: the shards', their gradients' and states'; `reduce_dtype`: what gradients are
    reduced in. `reshards`: layers whose gathered weights go after the forward, and are gathered
    again on the way back; the root's stay in any case (_fsdp_state.py, _lazy_init).
    """

    shards: int
    held_dtype: str
    reduce_dtype: str
    reshards: Resharded

    def frees(self, *, last: bool) -> bool:
        """Whether a layer's gathered weights go after its forward."""
        return self.reshards == "all" or (self.reshards == "all-but-last" and not last)

    def shard(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a parameter, what the first rank has."""
        return (-(-shape[0] // self.shards), *shape[1:])

    @property
    def held_bytes(self) -> int:
        """Of an element of a shard."""
        return element_bytes(self.held_dtype)

    @property
    def reduced_bytes(self) -> int:
        """Of an element that is reduced."""
        return element_bytes(self.reduce_dtype)


def shard_rows(model: Model, sharding: Sharding) -> list[Row]:
    """A rank's shards, a row for each group of parameters."""
    sizes: dict[str, tuple[int, int]] = {}
    for p in model.parameters():
        tensors, elements = sizes.get(p.group, (0, 0))
        shard = sharding.shard(lying(model, p, inside=p.layer is not None))
        sizes[p.group] = (tensors + 1, elements + prod(shard))
    note = f"one of {sharding.shards} shards of each, padded to whole rows"
    return parameter_rows(sizes, sharding.held_bytes, note=note)


def lying(model: Model, p: Parameter, *, inside: bool) -> tuple[int, ...]:
    """How a parameter lies in its module, `inside` a layer or not: GPT-2's Conv1D is [in, out]."""
    turned = inside and model.transposed_linears and len(p.shape) == 2
    return p.shape[::-1] if turned else p.shape


def elements(shapes: Iterable[tuple[int, ...]]) -> int:
    """Of all these tensors."""
    return sum(map(prod, shapes))
