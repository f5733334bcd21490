"""The way back through a graph, in the order and with the lifetimes of torch's engine.

torch/csrc/autograd/engine.cpp and its neighbours, torch 2.13, on one thread:

* nodes run in the reverse order of their making; a leaf takes its gradient as soon as nothing more
  flows into it;
* what flowed into a node lives until its outputs are made and validated: the gradient of something
  repeated is summed to its size, one of another dtype is cast;
* then what it saved goes, and only then its outputs flow on. Where a gradient waits already, the
  two are added, into the one that waits or into a third tensor (input_buffer.cpp);
* what has to be computed again comes when the node begins, and goes with its formula;
* a leaf takes the gradient as it is, if that lies as the leaf does, else a copy
  (accumulate_grad.h); where it has one already, the new one is added to it in place. A tied
  weight is summed up before, while it waits.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace

from planner.autograd.aten import Aten
from planner.autograd.layouts import is_dense
from planner.autograd.tensors import Gradients, Leaf, Node, Tensor
from planner.program import ADDED

ALONE = 2
"""References of what one name has, as sys.getrefcount counts: the name and its own argument."""


@dataclass(slots=True)
class Graph:
    """Nodes in the order in which they were made; the first one stands for what came before."""

    nodes: list[Node] = field(default_factory=list)


def run_back(aten: Aten, graph: Graph, carried: Gradients) -> None:
    """Play the graph back. `carried` holds the gradient of its result, then that of its entrance.

    The list is emptied and filled, so that no reference is left behind. It is empty where the
    result went into other graphs, from which its gradient came already.
    """
    last, entrance = graph.nodes[-1], graph.nodes[0]
    if carried:
        gradient = carried.pop()
        assert gradient is not None
        last.waiting[0] = gradient
        del gradient
    for node in graph.nodes[:0:-1]:
        if node.waiting:
            aten.doing = f"{node.name} backward"
            _run(aten, node)
    aten.doing = ""
    graph.nodes.clear()
    if entrance.waiting:
        carried.append(entrance.waiting.pop(0))


def _run(aten: Aten, node: Node) -> None:
    made = _call(aten, node)
    node.saved.clear()
    node.unpack = None
    ready: list[Leaf] = []
    for index, (target, output) in enumerate(node.edges):
        if made[index] is None or target is None:
            continue
        if isinstance(target, Leaf):
            _meet(aten, target, made, index)
            if target.expected == 0:
                ready.append(target)
        else:
            _add(aten, target, output, made, index)
    for leaf in ready:
        _accumulate(aten, leaf)


def _call(aten: Aten, node: Node) -> Gradients:
    """The node's formula, then torch's validation of what it made."""
    flowed: Gradients = [node.waiting.pop(i, None) for i in range(node.outputs)]
    if node.unpack is not None:
        node.saved = node.unpack()
    made = node.backward(node, flowed)
    if node.unpack is not None:
        node.saved.clear()
    for index, like in enumerate(node.inputs):
        gradient = made[index]
        if gradient is not None and node.wants[index]:
            made[index] = None
            gradient = aten.sum_to(gradient, like, f"gradient of {like.name}")
            made[index] = aten.cast(gradient, like.itemsize, f"gradient of {like.name}")
    return made


def _add(aten: Aten, target: Node, output: int, made: Gradients, index: int) -> None:
    waiting: Gradients = [target.waiting.pop(output, None)]
    new = _taken(made, index, moved=waiting[0] is None)
    target.waiting[output] = _summed(aten, waiting, new)


def _meet(aten: Aten, leaf: Leaf, made: Gradients, index: int) -> None:
    leaf.expected -= 1
    waiting: Gradients = [leaf.waiting]
    leaf.waiting = None
    new = _taken(made, index, moved=waiting[0] is None)
    leaf.waiting = _summed(aten, waiting, new)
    if leaf.expected and not aten.watched and not leaf.waiting.storage.buffer.gradient:
        _name(leaf, leaf.waiting)  # more may be added to it where it lies


def _taken(made: Gradients, index: int, *, moved: bool) -> Tensor:
    """One of a node's outputs; what is added to another stays there until all have flowed on."""
    new = made[index]
    assert new is not None
    if moved:
        made[index] = None
    return new


def _summed(aten: Aten, waiting: Gradients, new: Tensor) -> Tensor:
    """What waits and what arrives: added in place where nobody else has what waits, or its bytes.

    torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace: a view keeps what it is one of, so
    its bytes are never its own. Under a dispatch mode never.
    """
    old = waiting.pop()
    if old is None:
        return new
    alone = (
        not old.is_view and sys.getrefcount(old) == ALONE and sys.getrefcount(old.storage) == ALONE
    )
    if alone and not aten.watched and is_dense(old.sizes, old.strides):
        aten.add_into(old, new)
        return old
    return aten.elementwise("add.Tensor", new.name, old, new)


def _accumulate(aten: Aten, leaf: Leaf) -> None:
    new, leaf.waiting = leaf.waiting, None
    assert new is not None
    like = leaf.tensor
    if leaf.grad is not None:
        called, aten.doing = aten.doing, f"{leaf.grad.name}{ADDED}"
        aten.add_into(leaf.grad, new)
        aten.doing = called
        return
    obeys = all(
        n == 1 or s == w for n, s, w in zip(new.sizes, new.strides, like.strides, strict=True)
    )
    if not obeys:
        new = aten.new("clone", new.name, like.dims, like.itemsize, reads=(new,))
    if not new.storage.buffer.gradient:
        _name(leaf, new)
    leaf.grad = new


def _name(leaf: Leaf, gradient: Tensor) -> None:
    if leaf.gathered:
        return
    name = f"gradient of {leaf.tensor.name}"
    buffer = gradient.storage.buffer
    gradient.storage.known_as(replace(buffer, name=name, gradient=True))
