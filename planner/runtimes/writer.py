"""What the programs of torch runtimes share: linear layers, rotations, casts, the residual."""

from __future__ import annotations

from planner.dtypes import element_bytes
from planner.layers import Layer, RoPE
from planner.model import Model
from planner.program import B, Buffer, Shape, T, Tape

FLOAT32, INT64, BOOL = 4, 8, 1


class Writer:
    """A tape, the model it is written for and bytes of its dtype."""

    def __init__(self, model: Model, dtype: str) -> None:
        self.model = model
        self.b = element_bytes(dtype)
        self.tape = Tape()
        shape = (B, T, model.hidden_size)
        self.hidden = Buffer(name="hidden states", shape=shape, itemsize=self.b)

    def replaced(self, new: Buffer, old: Buffer) -> Buffer:
        """`name = new` where `name` was the last reference to `old`."""
        self.tape.free(old)
        return new

    @staticmethod
    def copy_of(cast: Buffer, original: Buffer) -> tuple[Buffer, ...]:
        """The cast's own storage, if the cast made one."""
        return () if cast is original else (cast,)

    def linear(self, name: str, x: Buffer, out: int, *, bias: bool = False) -> Buffer:
        """x · Wᵀ (+ bias): 2 · rows · in · out FLOPs."""
        into = x.shape[-1]
        assert isinstance(into, int)
        rows = x.shape[:-1]
        return self.tape.new(
            name,
            (*rows, out),
            self.b,
            flops=(2, *rows, into, out),
            reads=(x,),
            weight_bytes=self.b * out * (into + bias),
            kernel="addmm" if bias else "mm",
        )

    def rotate(self, x: Buffer, rows: Shape, D: int, rotary: int) -> Buffer:
        """x · cos + rotate_half(x) · sin over the first `rotary` of D, each step a tensor."""
        tape, b, full = self.tape, self.b, (*rows, rotary)
        half = (*rows, rotary // 2, b)
        straight = tape.new("rotary", full, b, reads=(x,))
        negated = tape.new("rotary", half[:-1], b, moved=(half,))
        positions = self.model.positions
        stacks = isinstance(positions, RoPE) and positions.interleaved  # a copy for each half
        turned = tape.new(
            "rotary",
            full,
            b,
            moved=(half, half),
            kernel="stack" if stacks else "cat",
            loop="strided" if stacks else "joined",
        )
        tape.free(negated)
        product = tape.new("rotary", full, b, reads=(turned,))
        tape.free(turned)
        out = tape.new("rotated", full, b, reads=(straight, product))
        tape.free(product, straight)
        if rotary == D:
            return out
        parts = ((*full, b), (*rows, D - rotary, b))
        whole = tape.new("rotated", (*rows, D), b, moved=parts, kernel="cat", loop="joined")
        return self.replaced(whole, out)


def layer_label(layer: Layer) -> str:
    """A name that tells layers of different kinds apart."""
    return f"layer of kind {hash(layer)}"
