"""Optimizers that walk through the parameters one by one, and torch's Adafactor over lists.

What a step holds besides gradients and states are the tensors that its Python names, and each lives
until the name is given to the next one: in a loop that is a parameter later. Written beside
torch/optim/_adafactor.py and _muon.py of torch 2.13 and transformers/optimization.py of 5.23.

Shapes.  n elements of a parameter, rows × columns of a matrix; experts are many matrices in one
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod

from planner.program import Buffer, Tape
from planner.trained.optimizer_parts import Part, columns, once, rows

FLOAT32, BFLOAT16 = 4, 2
NEWTON_SCHULZ_STEPS = 5
NORM = "norm().item"
"""A norm that Python reads as a number."""


UPDATE_PASSES = (("_foreach_clamp_min_", 2), ("_foreach_rsqrt_", 2), ("_foreach_mul_", 3))
"""From an estimate of variance to its parameter's update, and how often each reads or writes an
element."""


class LoopWriter:
    """One loop over parameters: `step` writes one of them, with `let` for what it names."""

    def __init__(self, tape: Tape, title: str, b: int) -> None:
        self.tape, self.title, self.b = tape, title, b
        self.names: dict[str, Buffer] = {}
        self._known: dict[tuple[str, int], Buffer] = {}  # what a part makes, the same every time
        self._identity: dict[Buffer, tuple[str, int]] = {}
        self._ends: dict[str, dict[str, Buffer]] = {}
        self._label, self._made = "", 0

    def step(self, shape: tuple[int, ...]) -> None:
        """One parameter."""
        raise NotImplementedError

    def write(self, parts: Sequence[Part]) -> None:
        """All of them; what was named last goes when the loop returns."""
        for part in parts:
            for count, layer in _first_and_others(part):
                self._label = part.label
                held = ", ".join(f"{n} {self._identity[b]}" for n, b in self.names.items())
                label = f"{self.title} of {part.label} behind {held or 'nothing'}"
                if self.tape.again(label, count=count, first_layer=layer):
                    self.names = dict(self._ends[label])
                    continue
                with self.tape.segment(label, count=count, first_layer=layer):
                    self._made = 0
                    for shape in part.shapes:
                        self.step(shape)
                self._ends[label] = dict(self.names)
        with self.tape.segment(f"{self.title}: end"):
            self.tape.free(*dict.fromkeys(self.names.values()))
        self.names = {}

    def make(
        self, name: str, elements: int, itemsize: int, kernel: str, *, read: int = 0
    ) -> Buffer:
        """What an op returns, without a name yet; `read`: elements beside as many as it makes."""
        key = self._label, self._made
        self._made += 1
        known = self._known.get(key)
        moved = ((read or elements, itemsize),)
        made = self.tape.new(name, (elements,), itemsize, moved=moved, kernel=kernel, into=known)
        self._known[key], self._identity[made] = made, key
        return made

    def let(self, name: str, made: Buffer | None) -> None:
        """`name = made`: what it was goes, if nothing else has that name's tensor."""
        old = self.names.pop(name, None)
        if made is not None:
            self.names[name] = made
        if old is not None and old not in self.names.values():
            self.tape.free(old)

    def scalar(self, kernel: str, itemsize: int, read: int = 1) -> None:
        """A number of so many that goes at once."""
        self.tape.free(self.make("norm", 1, itemsize, kernel, read=read))

    def in_place(self, kernel: str, elements: int, times: int, *, loop: str = "") -> None:
        """An op that allocates nothing."""
        self.tape.run(self.title, moved=((times, elements, self.b),), kernel=kernel, loop=loop)


def _first_and_others(part: Part) -> Iterator[tuple[int, int | None]]:
    """Behind another part, then behind itself: (how many, the first layer)."""
    yield 1, part.first_layer
    if part.count > 1:
        yield part.count - 1, None if part.first_layer is None else part.first_layer + 1


class Adafactor(LoopWriter):
    """torch.optim.Adafactor, for-loop (arXiv:1804.04235)."""

    def step(self, shape: tuple[int, ...]) -> None:
        """_single_tensor_adafactor."""
        n, b = prod(shape), self.b
        self.scalar(NORM, b, read=n)
        if len(shape) > 1:
            for name, size in (("row mean", rows(shape)), ("column mean", columns(shape))):
                self.let(name, self.make(name, size, b, "linalg_vector_norm", read=n))
                self.in_place("lerp_.Scalar", size, 3)
            self.let("estimate", self.make("estimate of variance", n, b, "mm"))
            mean = self.make("mean", prod(shape[:-2]), b, "mean.dim")
            self.in_place("div_.Tensor", n, 2, loop="strided")  # by one number
            self.tape.free(mean)
        else:
            self.let("square", self.make("squared gradient", n, b, "mul.Tensor"))
            self.in_place("lerp_.Scalar", n, 3)
            self.let("estimate", self.make("estimate of variance", n, b, "clone"))
        self.let("update", self.names["estimate"])
        self.in_place("clamp_", n, 2)
        self.in_place("rsqrt_", n, 2)
        self.in_place("mul_.Tensor", n, 3)
        self.scalar(NORM, b, read=n)
        self.in_place("add_.Tensor", n, 3)


class TransformersAdafactor(LoopWriter):
    """transformers.optimization.Adafactor as Trainer sets it: in float32 whatever the dtype."""

    def step(self, shape: tuple[int, ...]) -> None:
        """Adafactor.step of one parameter, without a first moment."""
        n = prod(shape)
        for name in ("gradient", "parameter"):
            self.let(name, None)
            if self.b != FLOAT32:
                self.let(name, self.make(f"float32 {name}", n, FLOAT32, "_to_copy"))
            if name == "parameter":
                self._rms("root mean square")
        square = self.make("squared gradient", n, FLOAT32, "pow.Tensor_Scalar")
        self.let("update", self.make("update", n, FLOAT32, "add.Tensor"))
        self.tape.free(square)
        if len(shape) > 1:
            self._factored(shape)
        else:
            self.in_place("add_.Tensor", n, 3)
            self.let("update", self.make("update", n, FLOAT32, "rsqrt"))
        self.in_place("mul_.Tensor", n, 3)
        norm = self.make("norm", 1, FLOAT32, "linalg_vector_norm")
        first = self.make("norm", 1, FLOAT32, "div.Tensor")
        self.tape.free(norm)
        second = self.make("norm", 1, FLOAT32, "div.Tensor")
        self.tape.free(first)
        self.in_place("div_.Tensor", n, 2)
        self.tape.free(second)
        negative = self.make("update", n, FLOAT32, "neg")
        self.in_place("add_.Tensor", n, 3)
        self.tape.free(negative)

    def _rms(self, name: str) -> None:
        """norm / √n; the state of the step before goes when the new one is there."""
        norm = self.make("norm", 1, FLOAT32, "linalg_vector_norm")
        self.tape.free(norm, self.make(name, 1, FLOAT32, "div.Tensor"))

    def _factored(self, shape: tuple[int, ...]) -> None:
        """Means over the last two dimensions, and _approx_sq_grad."""
        for size in (rows(shape), columns(shape)):
            mean = self.make("mean", size, FLOAT32, "mean.dim")
            self.in_place("add_.Tensor", size, 3)
            self.tape.free(mean)
        mean = self.make("mean", prod(shape[:-2]), FLOAT32, "mean.dim")
        row = self.make("rows", rows(shape), FLOAT32, "div.Tensor")
        self.tape.free(mean)
        column = self.make("columns", columns(shape), FLOAT32, "rsqrt")
        made = self.make("update", prod(shape), FLOAT32, "mul.Tensor")
        self.tape.free(row, column)
        self.let("update", made)


class Muon(LoopWriter):
    """torch.optim.Muon: momentum, orthogonalised by Newton–Schulz in bfloat16."""

    def step(self, shape: tuple[int, ...]) -> None:
        """_single_tensor_muon."""
        n, b = prod(shape), self.b
        self.in_place("lerp_.Scalar", n, 3)
        self.let("update", self.make("momentum with the gradient", n, b, "lerp.Scalar"))
        self.let("update", self._orthogonal(shape))
        self.in_place("mul_.Tensor", n, 2)
        self.in_place("add_.Tensor", n, 3, loop="strided" if _is_tall(shape) else "")

    def _orthogonal(self, shape: tuple[int, ...]) -> Buffer:
        """_zeropower_via_newtonschulz: of an m × k matrix, m ≤ k, with Gram matrices m × m.

        addmm copies the matrix that it adds to before it multiplies (ATen/native/cuda/Blas.cpp). A
        tall one goes in and comes back as its transpose.
        """
        n, m = prod(shape), min(shape)
        if self.b != BFLOAT16:
            self.let("matrix", self.make("matrix", n, BFLOAT16, "_to_copy"))
        else:
            self.let("matrix", self.names["update"])
        norm = self.make("norm", 1, BFLOAT16, "linalg_vector_norm", read=n)
        least = self.make("norm", 1, BFLOAT16, "clamp")
        self.tape.free(norm)
        self.in_place("div_.Tensor", n, 2, loop="strided")  # by one number
        self.tape.free(least)
        for turn in range(NEWTON_SCHULZ_STEPS):
            turned = "strided" if turn == 0 and _is_tall(shape) else ""
            self.let("gram", self._product("Gram matrix", m, m, n // m))
            self.in_place("copy_", m * m, 2)
            self.let("gram update", self._product("update of the Gram matrix", m, m, m))
            self.in_place("copy_", n, 2, loop=turned)
            self.let("matrix", self._product("matrix", m, n // m, m))
        self.let("gram", None)
        self.let("gram update", None)
        return self.names.pop("matrix")

    def _product(self, name: str, m: int, n: int, k: int) -> Buffer:
        key = self._label, self._made
        self._made += 1
        made = self.tape.new(
            name,
            (m, n),
            BFLOAT16,
            flops=(2, m, n, k),
            moved=((m * k + k * n + m * n, BFLOAT16),),
            kernel="mm",
            into=self._known.get(key),
        )
        self._known[key], self._identity[made] = made, key
        return made


def _is_tall(shape: tuple[int, ...]) -> bool:
    """More rows than columns."""
    return shape[0] > shape[1]


class AdafactorLists:
    """torch.optim.Adafactor, foreach: matrices together, then vectors."""

    def __init__(self, tape: Tape, b: int) -> None:
        self.tape, self.b = tape, b
        self.made: dict[tuple[str, str], list[Buffer]] = {}

    def write(self, parts: Sequence[Part]) -> None:
        """_multi_tensor_adafactor."""
        matrices = [part.with_shapes(lambda s: len(s) > 1) for part in parts]
        vectors = [part.with_shapes(lambda s: len(s) == 1) for part in parts]
        kernel = "linalg_vector_norm"
        self._numbers(matrices, "norms of matrices")
        for name, size in (("row means", rows), ("column means", columns)):
            self._list(name, matrices, size, kernel, read=prod)
            self._drop(name, matrices)
        self._list("updates", matrices, prod, "mm")
        self._list("means of rows", matrices, lambda s: prod(s[:-2]), "mean.dim", read=rows)
        self._each("updates over their rows' means", matrices, "div_.Tensor", 2, loop="strided")
        self._drop("means of rows", matrices)
        self._update(matrices, "matrices")
        self._numbers(vectors, "norms of vectors")
        self._list("squared gradients", vectors, prod, "_foreach_mul")
        self._each("variances", vectors, "_foreach_lerp_", 3)
        self._drop("squared gradients", vectors)
        self._list("updates of vectors", vectors, prod, "clone")
        self._drop("updates", matrices)  # the same name
        self._update(vectors, "vectors")
        self._drop("updates of vectors", vectors)

    def _update(self, parts: Sequence[Part], of: str) -> None:
        """From the estimates of variance on, in place of them."""
        for kernel, times in UPDATE_PASSES:
            self._each(f"{kernel} of {of}", parts, kernel, times)
        self._numbers(parts, f"norms of updates, {of}")
        for kernel, times in (("_foreach_mul_.ScalarList", 2), ("_foreach_add_", 3)):
            self._each(f"{kernel} of {of}", parts, kernel, times)

    def _each(
        self, name: str, parts: Sequence[Part], kernel: str, times: int, *, loop: str = ""
    ) -> None:
        """What allocates nothing: one kernel over a part, or one a parameter where it goes along
        them one by one.
        """
        for part in parts:
            with once(self.tape, f"{name}, {part.label}", part) as anew:
                sizes = part.sizes if loop else (sum(part.sizes),)
                for size in sizes if anew else ():
                    if size:
                        moved = ((times, size, self.b),)
                        self.tape.run("Adafactor", moved=moved, kernel=kernel, loop=loop)

    def _numbers(self, parts: Sequence[Part], what: str) -> None:
        """p.norm(2).item(), one after the other."""
        for part in parts:
            with once(self.tape, f"{what}, {part.label}", part) as anew:
                for size in part.sizes if anew else ():
                    moved = ((size, self.b),)
                    norm = self.tape.new("norm", (1,), self.b, moved=moved, kernel=NORM)
                    self.tape.free(norm)

    def _list(
        self,
        name: str,
        parts: Sequence[Part],
        size: Callable[[tuple[int, ...]], int],
        kernel: str,
        *,
        read: Callable[[tuple[int, ...]], int] | None = None,
    ) -> None:
        """A new tensor a parameter; `read`: elements that each is made of."""
        for part in parts:
            with once(self.tape, f"{name}, {part.label}", part) as anew:
                if anew:
                    self.made[name, part.label] = [
                        self.tape.new(
                            name,
                            (size(s),),
                            self.b,
                            moved=(((read or size)(s), self.b),),
                            kernel=kernel,
                        )
                        for s in part.shapes
                    ]

    def _drop(self, name: str, parts: Sequence[Part]) -> None:
        for part in parts:
            with once(self.tape, f"end of {name}, {part.label}", part) as anew:
                if anew:
                    self.tape.free(*self.made.get((name, part.label), ()))
