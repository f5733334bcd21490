"""chunked_loss.py of attnlab: head and cross-entropy of some tokens at a time.

The gradients are made on the way forward, chunk by chunk, and scaled on the way back. What a chunk
allocates goes before the next one: as a segment it repeats, so often as the tokens of all
sequences hold whole chunks, and a shorter one may follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from planner.autograd.functions import Functions
from planner.autograd.recording import only
from planner.autograd.tensors import Gradients, Leaf, Like, Node, Tensor
from planner.model import Model
from planner.program import B, Buffer, Dims, Program, T
from planner.runtimes.attnlab_training.regime import last_chunk
from planner.runtimes.writer import BOOL, FLOAT32, INT64

WHOLE, SHORTER = "a chunk of the loss", "the last chunk of the loss"
ROWS = (B, T)


def in_chunks(program: Program, chunk_tokens: int | None, dims: Dims) -> Program:
    """A step's program with as many chunks as this point has; itself without chunks.

    ⌊B · T / C⌋ of C tokens, and one of the rest.
    """
    if chunk_tokens is None:
        return program
    whole, rest = divmod(dims.batch * dims.tokens, chunk_tokens)
    return _repeating(program, whole, int(rest > 0))


@lru_cache(maxsize=256)
def _repeating(program: Program, whole: int, shorter: int) -> Program:
    return program.repeating({WHOLE: whole, SHORTER: shorter})


class ChunkedLoss:
    """_ChunkedLoss, forward and backward, of a model's head and `chunk_tokens` at a time."""

    def __init__(self, f: Functions, model: Model, chunk_tokens: int) -> None:
        self.f, self.aten, self.model, self.chunk_tokens = f, f.aten, model, chunk_tokens

    def loss(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, gradient: Buffer | None
    ) -> Tensor:
        """chunked_loss of hidden states [B, T, h], whose gradient may be known as a buffer."""
        f = self.f
        x = f.view(x, (ROWS, x.dims[-1]))
        inputs = [x, weight] if bias is None else [x, weight, bias]
        self.itemsize = f.low or x.itemsize
        with f.outside_autocast():
            loss, made = self._forward(inputs, gradient)

        def backward(node: Node, flowed: Gradients) -> Gradients:
            scale, kept = only(flowed), iter(node.saved)
            found: Gradients = [next(kept) if wanted else None for wanted in node.wants]
            for scaled in found:
                if scaled is not None:
                    self.aten.in_place("mul_.Tensor", scaled.name, scaled, scaled, scale)
            return found

        return f.function(backward, inputs, loss, made)

    def _forward(
        self, inputs: Sequence[Tensor], handed: Buffer | None
    ) -> tuple[Tensor, list[Tensor]]:
        """The loss, and the gradients of what wants one."""
        aten = self.aten
        x, *head = inputs
        head = [aten.cast(part, self.itemsize, f"{part.name}, cast") for part in head]
        real = aten.new("ne.Scalar", "labels that count", (ROWS,), BOOL, rows=((*ROWS, INT64),))
        wide = [((*ROWS,), INT64)] if aten.on_gpu else []  # ReduceOpsUtils.h, make_reduction
        count = aten.new("sum", "count of labels", (), INT64, reads=(real,), scratch=wide)
        least = aten.elementwise("clamp", "count of labels", count)
        share = aten.elementwise("div.Tensor", "share of a label", real, least, itemsize=FLOAT32)
        del least
        made = [self._zeros(part) if part.node is not None else None for part in inputs]
        if handed is not None and made[0] is not None:
            made[0].storage.known_as(handed)
        total = aten.new("zeros", "loss", (), FLOAT32)
        for label, tokens in (
            (WHOLE, self.chunk_tokens),
            (SHORTER, last_chunk(self.chunk_tokens)),
        ):
            with aten.tape.apart(label):
                self._chunk(aten.narrow(x, 0, tokens), head, share, total, made)
        any_real = aten.elementwise("gt.Scalar", "are there labels", count, itemsize=BOOL)
        return aten.where(any_real, total, "loss"), [g for g in made if g is not None]

    def _zeros(self, like: Tensor) -> Tensor:
        """zeros_like: that of a parameter is its gradient already, unless another comes."""
        name = f"gradient of {like.name}"
        made = self.aten.new("zeros_like", name, like.dims, like.itemsize)
        node = like.node
        if isinstance(node, Leaf) and not (node.expected and self.aten.watched):
            shape = made.shape
            made.storage.known_as(
                Buffer(name=name, shape=shape, itemsize=like.itemsize, gradient=True)
            )
        return made

    def _chunk(
        self, x: Tensor, head: list[Tensor], share: Tensor, total: Tensor, made: Gradients
    ) -> None:
        """One turn of the loop: logits, which become their gradients, and what these add."""
        aten, (weight, *biases) = self.aten, head
        dx, dw, *db = made
        tokens = x.dims[0][0]
        x = aten.cast(x, self.itemsize, "hidden states of a chunk")
        kernel = "addmm" if biases else "mm"
        logits = aten.mm(x, aten.transpose(weight, 0, 1), "logits", kernel=kernel)
        part = self._differentiate(logits, aten.narrow(share, 0, tokens))
        aten.in_place("add_.Tensor", "loss", total, total, part)
        del part
        if dx is not None:
            product = aten.mm(logits, weight, f"{dx.name}, of a chunk")
            aten.in_place("copy_", dx.name, aten.narrow(dx, 0, tokens), product)
            del product
        if dw is not None:
            turned = aten.transpose(logits, 0, 1)
            if dw.itemsize == self.itemsize:
                aten.add_product(dw, turned, x, dw.name)
            else:
                product = aten.mm(turned, x, f"{dw.name}, of a chunk")
                aten.in_place("add_.Tensor", dw.name, dw, dw, product)
                del product
        for bias in db:
            if bias is not None:
                like = Like(bias.dims, bias.sizes, bias.strides, bias.itemsize, bias.name)
                sums = aten.sum_to(logits, like, f"{bias.name}, of a chunk")
                aten.in_place("add_.Tensor", bias.name, bias, bias, sums)
                del sums

    def _differentiate(self, logits: Tensor, share: Tensor) -> Tensor:
        """_differentiate: a chunk's part of the loss."""
        aten, model = self.aten, self.model
        scale, cap = model.logit_scale, model.final_logit_softcapping
        column = (*share.dims, (1,))

        def change(kernel: str, x: Tensor, *others: Tensor) -> None:
            aten.in_place(kernel, x.name, x, x, *others)

        def as_column(x: Tensor) -> Tensor:
            seen = aten.as_view(x, column)
            assert seen is not None
            return seen

        if scale is not None:
            change("mul_.Tensor", logits)
        if cap is not None:
            change("div_.Tensor", logits)
            change("tanh_", logits)
        p = aten.cast(logits, FLOAT32, "float32 logits")
        if p is logits and cap is not None:
            p = aten.elementwise("_to_copy", "float32 logits", logits)
        if cap is not None:
            change("mul_.Tensor", p)
        if model.final_logits_bias:
            change("add_.Tensor", p)
        largest = aten.new("amax", "largest logits", column, FLOAT32, reads=(p,))
        change("sub_.Tensor", p, largest)
        del largest
        numbers = (*share.shape, INT64)
        places = aten.new("clamp", "labels of a chunk", share.dims, INT64, rows=(numbers,))
        picked = aten.new(
            "gather", "picked logits", share.dims, FLOAT32, rows=((*share.shape, FLOAT32),)
        )
        change("exp_", p)
        sums = aten.new("sum.dim_IntList", "sums of a chunk", share.dims, FLOAT32, reads=(p,))
        logs = aten.elementwise("log", "losses of a chunk", sums)
        losses = aten.elementwise("sub.Tensor", "losses of a chunk", logs, picked)
        del logs
        shares = aten.elementwise("mul.Tensor", "losses of a chunk", losses, share)
        del losses
        part = aten.new("sum", "loss of a chunk", (), FLOAT32, reads=(shares,))
        del shares
        factor = aten.elementwise("div.Tensor", "share / sum", share, sums)
        change("mul_.Tensor", p, as_column(factor))
        del factor
        turned = aten.elementwise("neg", "−share", share)
        moved = (numbers, *[(*share.shape, FLOAT32)] * 3)
        aten.tape.run(p.name, moved=moved, kernel="scatter_add_")
        del turned
        if cap is not None:
            for kernel in ("square_", "neg_", "add_.Tensor"):
                change(kernel, logits)
            change("mul_.Tensor", p, logits)
        if scale is not None:
            change("mul_.Tensor", p)
        aten.in_place("copy_", logits.name, logits, p)
        del places, picked
        return part
