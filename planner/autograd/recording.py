"""Differentiable ops: what the forward allocates and saves, and what the backward makes of it.

Every formula and every saved tensor is that of tools/autograd/derivatives.yaml of torch 2.13, the
order of the gradients of one op that of their names (VariableType makes them alphabetically). The
temporaries of a formula live until its end, as C++ has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from planner.autograd.aten import Aten
from planner.autograd.checkpointing import Frame
from planner.autograd.engine import Graph
from planner.autograd.tensors import Backward, Gradients, Node, Tensor


def only(flowed: Gradients) -> Tensor:
    """The gradient of the one output."""
    (gradient,) = flowed
    assert gradient is not None
    return gradient


class Recorder:
    """Records ops in `graph`."""

    def __init__(self, aten: Aten) -> None:
        self.aten, self.graph = aten, Graph()
        self.frame: Frame[Any] | None = None  # of the checkpointed block that runs

    def function(
        self, backward: Backward, inputs: Sequence[Tensor], out: Tensor, saved: Sequence[Tensor]
    ) -> Tensor:
        """What the forward of a torch.autograd.Function made, none of whose ops was recorded."""
        return self._record(backward, inputs, out, saved)

    def _record(
        self,
        backward: Backward,
        inputs: Sequence[Tensor],
        out: Tensor,
        saved: Sequence[Tensor] = (),
    ) -> Tensor:
        if any(x.node is not None for x in inputs):
            out.node = Node(out.name, backward, inputs, saved)
            self.graph.nodes.append(out.node)
            if self.frame is not None:
                self.frame.pack(out.node, out)
        return out
