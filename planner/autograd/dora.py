"""DoRA's part of a linear layer, as peft 0.21 computes it (peft/tuners/lora/dora.py).

arXiv:2402.09353: (m / ‖W + s·B·A‖ − 1) · W·x + m / ‖W + s·B·A‖ · s·B·A·x, m trained and the norm of
each row a constant. B·A comes of an identity matrix that runs through the adapters: [in, in],
[in, r] and [in, out] are there with W + s·B·A until the layer is done, but nothing of them is left
for the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner.autograd.aten import ONE
from planner.autograd.engine import Graph
from planner.autograd.functions import Functions
from planner.autograd.tensors import Leaf, Tensor


@dataclass(frozen=True, slots=True)
class Frozen:
    """A linear layer that is not trained; its weight [in, out] where `transposed`.

    That is Conv1D's (peft: fan_in_fan_out). `weight` gives it, one of 4 bits made anew.
    """

    weight: Callable[[], Tensor]
    bias: Tensor | None
    transposed: bool


@dataclass(frozen=True, slots=True)
class Trained:
    """What is trained beside it: A [r, in], B [out, r], m [out]."""

    into: Tensor
    back: Tensor
    magnitude: Tensor


def dora(
    f: Functions, frozen: Frozen, trained: Trained, x: Tensor, result: Tensor, module: str
) -> Tensor:
    """What is added to the layer's `result`: DoraLinearLayer.forward.

    Its names live until it returns.
    """
    name = f"{module}, DoRA"
    dead = Graph()  # of B · A, which is detached: what it saved goes with the name it has
    delta = _delta(f, trained, dead, name)
    delta = f.cast(delta, x.itemsize, f"{name}, B · A")
    weight = f.cast(frozen.weight(), x.itemsize, f"{name}, weight")
    norm = _row_norm(
        f, f.aten.transpose(weight, 0, 1) if frozen.transposed else weight, delta, name
    )
    scale = f.divide(trained.magnitude, norm, f"{name}, magnitude / norm")
    scale = f.view(scale, (ONE, *scale.dims))
    called = f"{module}, adapters"
    low = f.linear(f.linear(x, trained.into, None, called), trained.back, None, called)
    if frozen.bias is not None:
        result = f.sub(result, frozen.bias, f"{name}, without bias")
    first = f.mul(f.shift(scale, name), result, name)
    made = f.add(first, f.scale(f.mul(scale, low, name), name), name)
    dead.nodes.clear()
    return made


def _delta(f: Functions, trained: Trained, dead: Graph, name: str) -> Tensor:
    """DoraLinearLayer.get_lora_weight: B(A(identity))ᵀ, recorded in a graph of its own.

    Casts of the adapters are those that the layer uses, too: they stay in the pass's graph.
    """
    width, b = trained.into.dims[1], trained.into.itemsize
    identity = f.aten.new("eye", f"{name}, identity", (width, width), b)
    low = _apart(f, dead, identity, trained.into, name)
    return f.aten.transpose(_apart(f, dead, low, trained.back, name), 0, 1).detach()


def _row_norm(f: Functions, weight: Tensor, delta: Tensor, name: str) -> Tensor:
    """DoraLinearLayer.get_weight_norm: of the rows of W + s·B·A."""
    aten = f.aten
    whole = aten.elementwise(
        "add.Tensor",
        f"{name}, W + B · A",
        weight,
        aten.elementwise("mul.Tensor", f"{name}, B · A", delta),
    )
    wide = f.widened(whole)
    norm = aten.new(
        "linalg_vector_norm", f"{name}, norm", (whole.dims[0],), wide.itemsize, reads=(wide,)
    )
    return aten.cast(norm, whole.itemsize, f"{name}, norm")


def _apart(f: Functions, dead: Graph, x: Tensor, weight: Tensor, name: str) -> Tensor:
    """A linear layer whose history leads nowhere; a checkpointed block keeps none of it."""
    f.lowered(weight)
    leaf, graph, frame = weight.node, f.graph, f.frame
    assert isinstance(leaf, Leaf)
    expected = leaf.expected
    f.graph, f.frame = dead, None
    out = f.linear(x, weight, None, name)
    if frame is not None and not frame.runs_again:
        for node in dead.nodes:
            node.saved.clear()
    f.graph, f.frame, leaf.expected = graph, frame, expected
    return out
