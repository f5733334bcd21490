"""What an optimizer keeps, and one step of it as ops: torch.optim of torch 2.13.

AdamW (arXiv:1711.05101) keeps two moments of each parameter in its dtype, and the number of steps
as a float32. Its step makes the root of the second moment: for all parameters at once ("foreach":
torch/optim/adam.py, _multi_tensor_adam), for one after the other while the last one's is still
there ("for-loop": _single_tensor_adam), or inside a kernel ("fused"). SGD keeps nothing, with
momentum one tensor a parameter, and works in place. bitsandbytes' AdamW8bit keeps moments of a byte
with a float32 scale for each 256 (its kernels work in place), of tensors below 4 096 elements in
float32. Adafactor (arXiv:1804.04235) keeps a mean for each row and column of a matrix; Muon one
momentum of each hidden matrix, beside an AdamW for all else, as its documentation has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from planner.dtypes import element_bytes
from planner.ledger import Row
from planner.model import Model
from planner.program import Buffer, Shape, Tape
from planner.tensors import Parameter
from planner.trained.frozen import frozen_parts, unfrozen
from planner.trained.lora import adapter_bytes, adapters
from planner.trained.loss_scaling import LossScaler
from planner.trained.optimizer_loops import (
    FLOAT32,
    Adafactor,
    AdafactorLists,
    Muon,
    TransformersAdafactor,
)
from planner.trained.optimizer_parts import Part, columns, has_gradient, is_hidden, once, rows
from planner.trained.prefix_adapters import METHODS as PREFIXES
from planner.trained.prefix_adapters import trained_beside
from planner.trained.sharding import Sharding, lying
from planner.workload import OWN_WAY, Training

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


QUANTISED_FROM, BLOCK, MAPS_BYTES = 4096, 256, 2 * 256 * 4
"""bitsandbytes 0.50, optim/optimizer.py: elements from which moments take a byte, and of a scale;
of both maps of codes to numbers."""


def stepped_bytes(work: Training, dtype: str, sharding: Sharding | None = None) -> int:
    """Bytes of an element of what the optimizer steps, and of its states, computing in `dtype`."""
    if sharding is not None:
        return sharding.held_bytes
    if work.precision == "master":
        return FLOAT32
    if work.adapters is not None:
        return adapter_bytes(work.adapters)
    return element_bytes(work.held_dtype(dtype))


def copies_rows(model: Model, work: Training) -> list[Row]:
    """Master weights, which the optimizer holds, too; nothing where it steps the weights."""
    if not work.steps_copies:
        return []
    copied = trainable(model, work)
    elements = sum(p.count for p in copied)
    return [
        Row(
            component="optimizer",
            item="master weights, float32",
            count=1,
            formula="parameters · b",
            values=(("parameters", elements), ("b", FLOAT32)),
            size_bytes=elements * FLOAT32,
            note=f"{len(copied)} tensors",
        )
    ]


def optimizer_rows(
    model: Model, work: Training, *, dtype: str, device: str, sharding: Sharding | None = None
) -> list[Row]:
    """The states of the steady state, on the device; `dtype` is what is computed in."""
    b = stepped_bytes(work, dtype, sharding)
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for p in trained(model, work, sharding):
        for item, size in states(p, work, b, device):
            counts[item] = counts.get(item, 0) + 1
            sizes[item] = sizes.get(item, 0) + size
    if "moments of AdamW8bit" in sizes:
        sizes["maps of codes, AdamW8bit"], counts["maps of codes, AdamW8bit"] = MAPS_BYTES, 2
    return [_row(item, counts[item], size, b) for item, size in sizes.items()]


def trainable(model: Model, work: Training, sharding: Sharding | None = None) -> list[Parameter]:
    """What the optimizer is given: of sharded parameters the shards."""
    lora = work.adapters
    if lora is not None:
        return adapters(model, lora)
    if work.method in PREFIXES:
        return trained_beside(model, work.method)
    if sharding is None:
        return unfrozen(model.parameters(), model, frozen_parts(work))
    return [
        replace(p, shape=sharding.shard(lying(model, p, inside=p.layer is not None)))
        for p in model.parameters()
    ]


def trained(model: Model, work: Training, sharding: Sharding | None = None) -> list[Parameter]:
    """What the optimizer updates."""
    return [p for p in trainable(model, work, sharding) if has_gradient(model, p)]


def states(p: Parameter, work: Training, b: int, device: str) -> Iterator[tuple[str, int]]:
    """(what, bytes) of what the optimizer keeps of one parameter, in the order of its making."""
    n, shape, optimizer = p.count, p.shape, work.optimizer
    counted = device == "cpu" or work.optimizer_impl == "fused"  # else kept on the host
    if optimizer == "muon" and is_hidden(shape, p.layer):
        yield "momentum of Muon", n * b
    elif optimizer in ("adamw", "muon"):
        if counted:
            yield "step counts of AdamW", FLOAT32
        yield "moments of AdamW", n * b
        yield "moments of AdamW", n * b
    elif optimizer == "sgd-momentum":
        yield "momentum of SGD", n * b
    elif optimizer == "adamw-8bit":
        quantised = n >= QUANTISED_FROM
        for _ in range(2):
            yield "moments of AdamW8bit" if quantised else FEW, n if quantised else n * FLOAT32
        for _ in range(2 * quantised):
            yield "scales of AdamW8bit", -(-n // BLOCK) * FLOAT32
    elif optimizer in ("adafactor", "adafactor-transformers"):
        theirs = optimizer == "adafactor-transformers"
        each = FLOAT32 if theirs else b
        if not theirs and device == "cpu":
            yield "step counts of Adafactor", FLOAT32
        if len(shape) > 1:
            yield "means of rows, Adafactor", rows(shape) * each
            yield "means of columns, Adafactor", columns(shape) * each
        else:
            yield "variances of vectors, Adafactor", n * each
        if theirs:
            yield "root mean squares, Adafactor", FLOAT32


FEW = f"moments of AdamW8bit below {QUANTISED_FROM} elements"
ITEMSIZES = {"moments of AdamW8bit": 1}
IN_FLOAT32 = ("step counts", "scales", "root mean", "maps", FEW)


def _row(item: str, tensors: int, size: int, b: int) -> Row:
    itemsize = ITEMSIZES.get(item, FLOAT32 if item.startswith(IN_FLOAT32) else b)
    count = 2 if item.startswith("moments") else 1
    return Row(
        component="optimizer",
        item=item,
        count=count,
        formula="elements · b",
        values=(("elements", size // itemsize // count), ("b", itemsize)),
        size_bytes=size,
        note=f"{tensors} tensors",
    )


UPDATE_8BIT, UPDATE_32BIT = "optimizer_update_8bit_blockwise", "optimizer_update_32bit"
"""Ops of bitsandbytes' AdamW8bit (bitsandbytes/_ops.py), one a parameter."""
IN_PLACE = {"sgd": ("add_", 3), "sgd-momentum": ("add_", 6)}
"""Kernels that allocate nothing, and how often they read or write an element of a parameter."""


def _without_hidden(part: Part) -> Part:
    if part.first_layer is None:
        return part
    return part.with_shapes(lambda shape: len(shape) != 2)


class OptimizerWriter:
    """Writes one step on a tape, part by part; through a `scaler` where the loss was scaled."""

    def __init__(
        self, tape: Tape, optimizer: str, impl: str, b: int, scaler: LossScaler | None = None
    ) -> None:
        self.tape, self.optimizer, self.impl, self.b = tape, optimizer, impl, b
        self.scaler = scaler
        self.kept: dict[str, list[Buffer]] = {}  # what a part has made that lives after it

    def write(self, parts: Sequence[Part]) -> None:
        """The step, of Muon's AdamW behind its own."""
        if self.optimizer == "muon":
            inside = [part for part in parts if part.first_layer is not None]
            hidden = [part.with_shapes(lambda s: len(s) == 2) for part in inside]
            with self._scaled("Muon", hidden, fused=False):
                Muon(self.tape, "Muon", self.b).write(hidden)
            parts = [_without_hidden(part) for part in parts]
        fused = self.impl == "fused" and self.optimizer not in OWN_WAY
        with self._scaled("optimizer", parts, fused=fused):
            self._step(parts)
        if self.scaler is not None:
            self.scaler.update()

    def _scaled(
        self, name: str, parts: Sequence[Part], *, fused: bool
    ) -> AbstractContextManager[None]:
        elements = sum(part.count * sum(part.sizes) for part in parts)
        if self.scaler is None or not elements:
            return nullcontext()
        return self.scaler.stepping(name, elements, fused=fused)

    def _step(self, parts: Sequence[Part]) -> None:
        match self.optimizer, self.impl:
            case "adafactor", "foreach":
                AdafactorLists(self.tape, self.b).write(parts)
            case "adafactor", _:
                Adafactor(self.tape, "Adafactor", self.b).write(parts)
            case "adafactor-transformers", _:
                TransformersAdafactor(self.tape, "Adafactor", self.b).write(parts)
            case _:
                self._adamw_or_sgd(parts)

    def _adamw_or_sgd(self, parts: Sequence[Part]) -> None:
        """A part's first repetition follows another part, the later ones itself."""
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
        if self.optimizer == "adamw-8bit":
            self._blockwise(part)
        elif self.optimizer in IN_PLACE:
            self._run(*IN_PLACE[self.optimizer], total)
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

    def _blockwise(self, part: Part) -> None:
        """A kernel a parameter, which each is waited for: weights and gradients, moments of a byte
        with their scales or, of small parameters, in float32.
        """
        for n in part.sizes:
            weights: Shape = (3, n, self.b)
            moved: tuple[Shape, ...]
            if n < QUANTISED_FROM:
                moved, kernel = (weights, (4, n, FLOAT32)), UPDATE_32BIT
            else:
                scales = (4, -(-n // BLOCK), FLOAT32)
                moved, kernel = (weights, (4, n), scales), UPDATE_8BIT
            self.tape.run("adamw-8bit", moved=moved, kernel=kernel)

    def _free_all(self, parts: Sequence[Part]) -> None:
        for part in parts:
            with once(self.tape, f"roots of {part.label}", part) as anew:
                if anew:
                    self.tape.free(*self.kept.get(part.label, ()))

    def _run(self, kernel: str, times: int, elements: int) -> None:
        self.tape.run(self.optimizer, moved=((times, elements, self.b),), kernel=kernel)

    def _new(self, name: str, kernel: str, elements: int, into: Buffer | None = None) -> Buffer:
        shape: Shape = (elements,)
        moved: tuple[Shape, ...] = ((elements, self.b),)
        return self.tape.new(name, shape, self.b, moved=moved, kernel=kernel, into=into)
