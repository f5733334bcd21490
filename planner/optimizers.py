"""What an optimizer keeps, and one step of it as ops: torch.optim of torch 2.13.

AdamW (arXiv:1711.05101) keeps two moments of each parameter in its dtype, and the number of steps
as a float32. Its step makes the root of the second moment: for all parameters at once ("foreach":
torch/optim/adam.py, _multi_tensor_adam), for one after the other while the last one's is still
there ("for-loop": _single_tensor_adam), or inside a kernel ("fused"). SGD without momentum keeps
nothing and works in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.dtypes import element_bytes
from planner.ledger import Row
from planner.lora import adapter_bytes, adapters
from planner.model import Model
from planner.program import Buffer, Shape, Tape
from planner.workload import Training

ADAMW_PASSES = (
    ("_foreach_mul_", 2),  # weight decay: parameter read and written
    ("_foreach_lerp_", 3),  # first moment, gradient
    ("_foreach_mul_", 2),  # second moment
    ("_foreach_addcmul_", 3),  # second moment, gradient
    ("_foreach_sqrt", 2),  # second moment read, its root written
    ("_foreach_div_", 2),
    ("_foreach_add_", 2),
    ("_foreach_addcdiv_", 4),  # parameter, first moment, root
)
"""The ops of a step of AdamW and how often each reads or writes an element of a parameter."""


def optimizer_rows(model: Model, work: Training, *, dtype: str, device: str) -> list[Row]:
    """The states of the steady state, on the device."""
    if work.optimizer != "adamw":
        return []
    elements, tensors = model.parameter_count, sum(t for t, _ in model.parameter_groups().values())
    b = element_bytes(dtype)
    if work.adapters is not None:
        trained = adapters(model, work.adapters)
        elements, tensors = sum(p.count for p in trained), len(trained)
        b = adapter_bytes(work.adapters)
    moments = Row(
        component="optimizer",
        item="moments of AdamW",
        count=2,
        formula="parameters · b",
        values=(("parameters", elements), ("b", b)),
        size_bytes=2 * elements * b,
    )
    if device != "cpu" and work.optimizer_impl != "fused":  # adam.py keeps the counts on the host
        return [moments]
    counts = Row(
        component="optimizer",
        item="step counts of AdamW",
        count=1,
        formula="tensors · 4",
        values=(("tensors", tensors),),
        size_bytes=4 * tensors,
    )
    return [moments, counts]


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A run of equal parts of the model: elements of each of its parameters, in their order."""

    label: str
    sizes: tuple[int, ...]
    count: int = 1
    first_layer: int | None = None


class OptimizerWriter:
    """Writes one step on a tape, part by part."""

    def __init__(self, tape: Tape, optimizer: str, impl: str, b: int) -> None:
        self.tape, self.optimizer, self.impl, self.b = tape, optimizer, impl, b
        self.kept: dict[str, list[Buffer]] = {}  # what a part has made that lives after it

    def write(self, parts: Sequence[Part]) -> None:
        """The step. A part's first repetition follows another part, the later ones itself."""
        before = ""
        for part in parts:
            first, last = part.first_layer, part.label
            follows = ((before, 1, first), (last, part.count - 1, first and first + 1))
            for previous, count, layer in follows:
                label = f"optimizer step: {previous} → {last}"
                if count and not self.tape.again(label, count=count, first_layer=layer):
                    with self.tape.segment(label, count=count, first_layer=layer):
                        self._update(part, previous)
            before = last
        with self.tape.segment("optimizer step: end"):
            if self.impl == "for-loop":
                self.tape.free(*self.kept.get(before, ())[-1:])
        if self.impl == "foreach":
            self._free_all(parts)

    def _update(self, part: Part, previous: str) -> None:
        total = sum(part.sizes)
        if self.optimizer == "sgd":
            self._run("add_", 3, total)
        elif self.impl == "fused":
            self._run("_fused_adamw_", 7, total)
        elif self.impl == "foreach":
            for kernel, times in ADAMW_PASSES:
                if kernel != "_foreach_sqrt":
                    self._run(kernel, times, total)
                else:
                    self.kept[part.label] = self._roots(part, kernel)
        else:
            self._one_by_one(part, previous)

    def _roots(self, part: Part, kernel: str) -> list[Buffer]:
        """One tensor for each parameter."""
        known: Sequence[Buffer | None] = self.kept.get(part.label) or [None] * len(part.sizes)
        return [
            self._new("root of second moment", kernel, size, into)
            for size, into in zip(part.sizes, known, strict=True)
        ]

    def _one_by_one(self, part: Part, previous: str) -> None:
        """A denominator lives until the next parameter's takes its name."""
        held = self.kept.get(previous, [])[-1:]
        known = self.kept.get(part.label)
        made = []
        for index, size in enumerate(part.sizes):
            for kernel, times in (("mul_", 2), ("lerp_", 3), ("mul_", 2), ("addcmul_", 3)):
                self._run(kernel, times, size)
            root = self._new("root of second moment", "sqrt", size)
            into = None if known is None else known[index]
            made.append(self._new("denominator", "div.Tensor", size, into))
            self.tape.free(root, *held)
            held = made[-1:]
            self._run("add_", 2, size)
            self._run("addcdiv_", 4, size)
        self.kept[part.label] = made

    def _free_all(self, parts: Sequence[Part]) -> None:
        for part in parts:
            label = f"roots of {part.label}"
            if not self.tape.again(label, count=part.count, first_layer=part.first_layer):
                with self.tape.segment(label, count=part.count, first_layer=part.first_layer):
                    self.tape.free(*self.kept.get(part.label, ()))

    def _run(self, kernel: str, times: int, elements: int) -> None:
        self.tape.run(self.optimizer, moved=((times, elements, self.b),), kernel=kernel)

    def _new(self, name: str, kernel: str, elements: int, into: Buffer | None = None) -> Buffer:
        shape: Shape = (elements,)
        moved: tuple[Shape, ...] = ((elements, self.b),)
        return self.tape.new(name, shape, self.b, moved=moved, kernel=kernel, into=into)
