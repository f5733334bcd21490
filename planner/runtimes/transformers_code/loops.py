"""Models whose loop keeps what a layer returned, eager attention's weights among it."""

from __future__ import annotations

from collections.abc import Iterator

from planner.autograd.tensors import Tensor
from planner.layers import GQA, Layer
from planner.program import B, Buffer, T
from planner.runtimes.transformers_code.attention import AttentionWriter


class LoopWriter(AttentionWriter):
    """`outputs = block(…); hidden_states = outputs[0]`: the rest goes when the next returns."""

    looped: Tensor | None = None

    def loop(self, weights: Tensor | None) -> None:
        """A layer returned these: those of the layer before go."""
        if self.known is not None:  # it runs again
            return
        in_graph = weights is None or weights.node is not None
        if self.trains and in_graph and not self.keeps_inputs:  # its graph holds them
            self.looped = None
            return
        if weights is not None:
            (heads,) = weights.dims[1] if len(weights.dims) == 4 else (weights.sizes[0],)
            shape = (B, heads, T, self.keys_of(None))
            held = Buffer(name="attention weights", shape=shape, itemsize=weights.itemsize)
            weights.storage.known_as(held if self.held is None else self.held)
            self.held = weights.storage.buffer
        self.looped = weights

    def _runs(self) -> Iterator[tuple[int, int, Layer, str]]:
        """Of hybrids, a layer behind one that attends is told apart: it lets go of weights."""
        weighs = self.code.loop and self.what.attention == "eager"
        attends = [isinstance(layer.attention, GQA) for layer in self.model.layers]
        if not weighs or all(attends):
            yield from super()._runs()
            return
        for start, count, layer, _ in super()._runs():
            behind = ", behind attention"
            yield start, 1, layer, behind if start and attends[start - 1] else ""
            if count > 1:
                yield start + 1, count - 1, layer, behind if attends[start] else ""

    held: Buffer | None = None
    """What they are called in every layer."""
