"""Loss scaling for float16: what torch.amp.GradScaler holds, and its ops around optimizer.step().

torch/amp/grad_scaler.py of torch 2.13, in the order of its documentation, which accelerate keeps
(optimizer.py, AcceleratedOptimizer.step): scaler.scale(loss).backward(), scaler.step(optimizer),
scaler.update(). It holds its scale and its growth tracker. An optimizer that is not fused finds its
gradients divided by the scale in place (`unscale_`); a fused one is handed scale and verdict, and
divides itself. What says whether a gradient is infinite lives until the update.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from planner.ledger import Row
from planner.program import Buffer, Tape

FLOAT32, FLOAT64 = 4, 8
HELD_BYTES = (FLOAT32, FLOAT32)
"""The scale, float32, and the growth tracker, int32."""
CHECK, UPDATE = "_amp_foreach_non_finite_check_and_unscale_", "_amp_update_scale_"


def scaler_row() -> Row:
    """What the scaler holds from its first loss on."""
    return Row(
        component="optimizer",
        item="scale and growth tracker of GradScaler",
        count=len(HELD_BYTES),
        formula="b",
        values=(("b", FLOAT32),),
        size_bytes=sum(HELD_BYTES),
    )


class LossScaler:
    """Writes scaler.step and scaler.update on a tape."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        self._found: list[Buffer] = []  # of each optimizer: whether a gradient is infinite

    @contextmanager
    def stepping(self, name: str, elements: int, *, fused: bool) -> Iterator[None]:
        """GradScaler.step: what is written inside is optimizer.step() over so many elements."""
        given: tuple[Buffer, ...] = ()
        with self.tape.segment(f"{name}: gradients are checked"):
            inverse = self._number("full") if fused else self._inverse()
            self._check(inverse, elements)
            if fused:
                given = self._number("add.Tensor"), self._number("mul.Tensor")
        yield
        if fused:
            with self.tape.segment(f"{name}: end of what it is handed"):
                self.tape.free(*given)

    def update(self) -> None:
        """GradScaler.update."""
        with self.tape.segment("update of the scale"):
            self.tape.run("scale", moved=((2 * len(HELD_BYTES), FLOAT32),), kernel=UPDATE)
            self.tape.free(*self._found)
        self._found.clear()

    def _inverse(self) -> Buffer:
        """scale.double().reciprocal().float()."""
        double = self._number("_to_copy", FLOAT64)
        reciprocal = self._number("reciprocal", FLOAT64)
        self.tape.free(double)
        inverse = self._number("_to_copy")
        self.tape.free(reciprocal)
        return inverse

    def _check(self, inverse: Buffer, elements: int) -> None:
        """_unscale_grads_: the device's copies of both numbers; the verdict's is kept."""
        verdict = self._number("full")
        self._found.append(self._number("_to_copy"))
        there = self._number("_to_copy")
        self.tape.run("gradients", moved=((2, elements, FLOAT32),), kernel=CHECK)
        self.tape.free(there, verdict, inverse)

    def _number(self, kernel: str, itemsize: int = FLOAT32) -> Buffer:
        return self.tape.new("loss scaling", (1,), itemsize, moved=((1, itemsize),), kernel=kernel)
