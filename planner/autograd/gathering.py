"""What torch's FSDP2 allocates around each part of a training step.

torch/distributed/fsdp/_fully_shard of torch 2.13: _fsdp_param_group.py (unshard, wait_for_unshard,
post_backward), _fsdp_collectives.py (foreach_all_gather, foreach_reduce). Groups of parameters are
the layers and the root, which has all that stands outside of them.

* unshard: shards of another dtype are cast into one flat tensor; all-gathered into another, of
  which this rank's part is a piece; the flat one goes. Both are made on a stream for copies, those
  of reduced gradients on one for reductions: torch's allocator has blocks of their own for each.
* wait_for_unshard: the weights get their bytes (one tensor each, kept without any in between) and
  take a copy. In the forward what was all-gathered stays until the next group's is copied out,
  too ("Note: Overlapping all-gather copy-in and all-gather": a name holds it to the end), on the
  way back it goes at once, and the layer before is unsharded ahead of its turn.
* post_backward: the weights' bytes go, then what the group before reduced from; all gradients are
  copied into one flat tensor and go, but for the last one, which a loop still names; the rank's
  part is reduced into another and cast to the shards' dtype: their gradients are views of it, or
  it is added to them and goes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from math import prod

from planner.autograd.tensors import Leaf
from planner.program import Buffer, Tape
from planner.trained.sharding import Sharding, elements

COPIES, REDUCTIONS = 1, 2
"""Streams besides the default one."""
ROOT = "root"
Sizes = tuple[int, ...]


class Group:
    """The buffers of parameters that are gathered together, the same for all groups of a size."""

    def __init__(self, shapes: Sequence[Sizes], sharding: Sharding, b: int) -> None:
        N, held, reduced = sharding.shards, sharding.held_bytes, sharding.reduced_bytes
        own = [sharding.shard(shape) for shape in shapes]
        n = elements(own)
        self.last = shapes[-1]
        self.cast = None
        if held != b:
            self.cast = Buffer(name="shards, cast", shape=(n,), itemsize=b, stream=COPIES)
        self.gathered = Buffer(name="all-gathered weights", shape=(n, N), itemsize=b, stream=COPIES)
        self.weights = [
            Buffer(name="unsharded weights", shape=(prod(s), N), itemsize=b) for s in own
        ]
        self.reducing = Buffer(name="gradients to reduce", shape=(n, N), itemsize=reduced)
        self.gradients = Buffer(
            name="sharded gradients", shape=(n,), itemsize=held, gradient=True, stream=REDUCTIONS
        )
        self.added = Buffer(  # to those that are there
            name="new sharded gradients", shape=(n,), itemsize=held, stream=REDUCTIONS
        )
        self.reduced = None
        if held != reduced:
            self.reduced = Buffer(
                name="reduced gradients", shape=(n,), itemsize=reduced, stream=REDUCTIONS
            )


class Gathering:
    """Writes what FSDP2 does on the tape, part by part."""

    def __init__(self, tape: Tape, sharding: Sharding, b: int, *, accumulates: bool) -> None:
        self.tape, self.sharding, self.b, self.accumulates = tape, sharding, b, accumulates
        self._groups: dict[Hashable, Group] = {}
        self._waiting: Group | None = None  # FSDPCommContext.all_gather_state
        self._reducing: Group | None = None  # FSDPCommContext.reduce_scatter_states

    def group(self, shapes: Iterable[Sizes], *, root: bool = False) -> Group:
        """That of parameters of these shapes: layers of the same ones share it."""
        shapes = tuple(shapes)
        key = (ROOT, shapes) if root else shapes
        if key not in self._groups:
            self._groups[key] = Group(shapes, self.sharding, self.b)
        return self._groups[key]

    def before_forward(self, group: Group) -> None:
        """pre_forward."""
        self._unshard(group)
        self._copy_out(group)
        self.end_forward()
        self._waiting = group

    def after_forward(self, group: Group) -> None:
        """post_forward of a layer that is resharded."""
        self.tape.free(*group.weights)

    def end_forward(self) -> None:
        """What was all-gathered last goes: in the next group's turn, or behind the root."""
        if self._waiting is not None:
            self.tape.free(self._waiting.gathered)
        self._waiting = None

    def before_backward(self, group: Group | None, ahead: Group | None) -> None:
        """pre_backward: of a layer and the one `ahead` of it; None where it is unsharded."""
        if group is not None:
            self._copy_out(group)
            self.tape.free(group.gathered)
        if ahead is not None:
            self._unshard(ahead)

    def after_backward(self, group: Group, leaves: Sequence[Leaf]) -> None:
        """post_backward; `leaves` are the group's parameters."""
        tape = self.tape
        last = next(leaf for leaf in leaves[::-1] if leaf.tensor.sizes == group.last)
        tape.free(*group.weights)
        self.end_backward()
        self._made(group.reducing, "chunk_cat")
        for leaf in leaves:
            if leaf is not last:
                leaf.grad = None
        made = group.added if self.accumulates else group.gradients
        if group.reduced is not None:
            self._made(group.reduced, "reduce_scatter")
        self._made(made, "reduce_scatter" if group.reduced is None else "_to_copy")
        tape.free(group.reduced)
        last.grad = None
        if self.accumulates:
            tape.free(made)
        self._reducing = group

    def end_backward(self) -> None:
        """What was reduced from last goes: in the next group's turn, or with the backward."""
        if self._reducing is not None:
            self.tape.free(self._reducing.reducing)
        self._reducing = None

    def at(self, *, waiting: Group | None = None, reducing: Group | None = None) -> None:
        """Where the step stands behind a segment that was written before and is repeated."""
        self._waiting, self._reducing = waiting, reducing

    def _unshard(self, group: Group) -> None:
        if group.cast is not None:
            self._made(group.cast, "_foreach_copy_")
        self._made(group.gathered, "all_gather")
        self.tape.free(group.cast)

    def _copy_out(self, group: Group) -> None:
        for weights in group.weights:
            self._made(weights, "split_with_sizes_copy")

    def _made(self, buffer: Buffer, kernel: str) -> None:
        moved = ((*buffer.shape, buffer.itemsize),)
        self.tape.new(
            buffer.name, buffer.shape, buffer.itemsize, moved=moved, into=buffer, kernel=kernel
        )
