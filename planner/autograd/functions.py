"""Differentiable ops: what the forward allocates and saves, and what the backward makes of it.

Every formula and every saved tensor is that of tools/autograd/derivatives.yaml of torch 2.13, the
order of the gradients of one op that of their names (VariableType makes them alphabetically). The
temporaries of a formula live until its end, as C++ has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.autograd.aten import ONE, Aten
from planner.autograd.engine import Graph
from planner.autograd.tensors import Backward, Dims, Gradients, Like, Node, Tensor
from planner.program import Extent, Shape, Symbol

FLOAT32 = 4


def only(flowed: Gradients) -> Tensor:
    """The gradient of the one output."""
    (gradient,) = flowed
    assert gradient is not None
    return gradient


class Functions:
    """The ops of torch.nn.functional that a decoder is made of, recorded in `graph`."""

    def __init__(self, aten: Aten) -> None:
        self.aten, self.graph = aten, Graph()

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
        return out

    # Views and copies

    def view(self, x: Tensor, dims: Dims, name: str = "") -> Tensor:
        """x.reshape(dims): a view, or a copy where it cannot be one."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            return [self.aten.reshape(only(flowed), node.inputs[0].dims)]

        seen = self.aten.reshape(x, dims)
        out = replace(seen, node=None, output=0, name=name or x.name)
        return self._record(backward, (x,), out)

    def transpose(self, x: Tensor, a: int, b: int) -> Tensor:
        """Two dimensions exchanged: a view."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            return [self.aten.transpose(only(flowed), a, b)]

        return self._record(backward, (x,), self.aten.transpose(x, a, b))

    def narrow(self, x: Tensor, length: Extent) -> Tensor:
        """The first, or the last, `length` of the last dimension: a view."""
        if x.dims[-1] == (length,):  # torch aliases; gradients meet at the alias
            return self._record(lambda node, flowed: [only(flowed)], (x,), replace(x))

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            return [
                self.aten.new(
                    "slice_backward", f"gradient of {like.name}", like.dims, like.itemsize
                )
            ]

        return self._record(backward, (x,), self.aten.narrow(x, -1, length))

    def split(self, x: Tensor, lengths: Sequence[Extent]) -> list[Tensor]:
        """The last dimension in parts: views. The way back joins the parts' gradients."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            parts = [part for part in flowed if part is not None]
            return [self.aten.cat(parts, -1, like, f"gradient of {like.name}")]

        parts = [self.aten.narrow(x, -1, length) for length in lengths]
        if x.node is not None:
            node = Node(x.name, backward, (x,), (), outputs=len(parts))
            self.graph.nodes.append(node)
            for output, part in enumerate(parts):
                part.node, part.output = node, output
        return parts

    def cat(self, parts: Sequence[Tensor], dims: Dims, name: str) -> Tensor:
        """Parts joined along the last dimension; their gradients are views of the whole's."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            whole = only(flowed)
            return [
                self.aten.narrow(whole, -1, like.dims[-1][0]) if wanted else None
                for like, wanted in zip(node.inputs, node.wants, strict=True)
            ]

        return self._record(backward, parts, self.aten.cat(parts, -1, dims, name))

    def cast(self, x: Tensor, itemsize: int, name: str = "") -> Tensor:
        """x.to(dtype), x itself where it is of that dtype; the gradient is cast back."""
        if x.itemsize == itemsize:
            return x

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            return [self.aten.cast(only(flowed), like.itemsize, f"gradient of {like.name}")]

        return self._record(backward, (x,), self.aten.cast(x, itemsize, name or x.name))

    # Elementwise

    def add(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """a + b: nothing is saved, both take the gradient as it is."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            return [only(flowed) if wanted else None for wanted in node.wants]

        return self._record(backward, (a, b), self.aten.elementwise("add.Tensor", name, a, b))

    def shift(self, x: Tensor, name: str) -> Tensor:
        """x + number."""
        out = self.aten.elementwise("add.Tensor", name, x)
        return self._record(lambda node, flowed: [only(flowed)], (x,), out)

    def scale(self, x: Tensor, name: str, *, kernel: str = "mul.Tensor") -> Tensor:
        """x · number, x / number or −x (`kernel`)."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            called = f"gradient of {node.inputs[0].name}"
            return [self.aten.elementwise(kernel, called, only(flowed))]

        return self._record(backward, (x,), self.aten.elementwise(kernel, name, x))

    def mul(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """a · b: each is saved where the other wants a gradient."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            gradient, kept = only(flowed), iter(node.saved)
            made: Gradients = [None, None]
            for index in (1, 0):
                if node.wants[index]:
                    called = f"gradient of {node.inputs[index].name}"
                    factor = next(kept)
                    made[index] = self.aten.elementwise("mul.Tensor", called, gradient, factor)
            return made

        saved = [x for x, other in ((a, b), (b, a)) if other.node is not None]
        out = self.aten.elementwise("mul.Tensor", name, a, b)
        return self._record(backward, (a, b), out, saved)

    def power(self, x: Tensor, name: str) -> Tensor:
        """xⁿ of a number n: grad · (n · xⁿ⁻¹)."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            (x,), called = node.saved, f"gradient of {node.inputs[0].name}"
            lower = self.aten.elementwise("pow.Tensor_Scalar", called, x)
            scaled = self.aten.elementwise("mul.Scalar", called, lower)
            return [self.aten.elementwise("mul.Tensor", called, only(flowed), scaled)]

        out = self.aten.elementwise("pow.Tensor_Scalar", name, x)
        return self._record(backward, (x,), out, (x,))

    def rsqrt(self, x: Tensor, name: str) -> Tensor:
        """1 / √x: −½ · grad · result³."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            (result,), called = node.saved, f"gradient of {node.inputs[0].name}"
            cube = self.aten.elementwise("pow.Tensor_Scalar", called, result)
            half = self.aten.elementwise("mul.Scalar", called, only(flowed))
            return [self.aten.elementwise("mul.Tensor", called, half, cube)]

        out = self.aten.elementwise("rsqrt", name, x)
        return self._record(backward, (x,), out, (out,))

    def pointwise(self, x: Tensor, name: str, kernel: str, *, saves: str) -> Tensor:
        """silu, gelu: the input is saved; tanh, relu: the result. One kernel goes back."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            (kept,), called = node.saved, f"gradient of {node.inputs[0].name}"
            back = "threshold_backward" if kernel == "relu" else f"{kernel}_backward"
            return [self.aten.elementwise(back, called, only(flowed), kept)]

        out = self.aten.elementwise(kernel, name, x)
        return self._record(backward, (x,), out, (x if saves == "input" else out,))

    def where(self, mask: Tensor, x: Tensor, name: str) -> Tensor:
        """x where the mask lets through, a number elsewhere: the mask is saved."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            (mask,), called = node.saved, f"gradient of {node.inputs[0].name}"
            return [self.aten.where(mask, only(flowed), called)]

        return self._record(backward, (x,), self.aten.where(mask, x, name), (mask,))

    # Reductions and norms

    def mean(self, x: Tensor, name: str) -> Tensor:
        """Over the last dimension, which stays as one: the gradient is spread and divided."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            spread = self.aten.expand(only(flowed), like)
            return [self.aten.elementwise("div.Scalar", f"gradient of {like.name}", spread)]

        out = self.aten.new("mean.dim", name, (*x.dims[:-1], ONE), x.itemsize, reads=(x,))
        return self._record(backward, (x,), out)

    def softmax(self, x: Tensor, name: str, *, kernel: str = "_softmax") -> Tensor:
        """Softmax, or its logarithm, over the last dimension: the result is saved."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            (result,), called = node.saved, f"gradient of {node.inputs[0].name}"
            reads = (only(flowed), result)
            return [
                self.aten.new(
                    f"{kernel}_backward_data", called, result.dims, result.itemsize, reads=reads
                )
            ]

        out = self.aten.new(kernel, name, x.dims, x.itemsize, reads=(x,))
        return self._record(backward, (x,), out, (out,))

    def layer_norm(
        self, x: Tensor, weights: Sequence[Tensor], name: str, *, statistics_bytes: int
    ) -> Tensor:
        """LayerNorm: saves x and the mean and inverse deviation of each row."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            reads = (only(flowed), *node.saved)
            return [
                self.aten.new(
                    "native_layer_norm_backward",
                    f"gradient of {like.name}",
                    like.dims,
                    like.itemsize,
                    reads=reads if index == 0 else (),
                )
                for index, like in enumerate(node.inputs)
            ]

        out = self.aten.new("native_layer_norm", name, x.dims, x.itemsize, reads=(x, *weights))
        column = (*x.dims[:-1], ONE)
        rows = [
            self.aten.new("native_layer_norm", f"{name} statistics", column, statistics_bytes)
            for _ in ("mean", "1 / deviation")
        ]
        return self._record(backward, (x, *weights), out, (x, *rows, *weights))

    # Matrix products

    def matmul(self, a: Tensor, b: Tensor, name: str, *, kernel: str = "mm") -> Tensor:
        """a · b, of matrices (mm) or as many pairs of them (bmm): each is saved for the other."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            gradient, (a, b) = only(flowed), node.saved
            made: Gradients = [None, None]
            if node.wants[1]:
                called = f"gradient of {node.inputs[1].name}"
                made[1] = self._right_gradient(a, b, gradient, called, kernel)
            if node.wants[0]:
                turned = self.aten.transpose(b, -2, -1)
                called = f"gradient of {node.inputs[0].name}"
                made[0] = self.aten.mm(gradient, turned, called, kernel=kernel)
            return made

        out = self.aten.mm(a, b, name, kernel=kernel)
        return self._record(backward, (a, b), out, (a, b))

    def _right_gradient(
        self, a: Tensor, b: Tensor, gradient: Tensor, called: str, kernel: str
    ) -> Tensor:
        """aᵀ · gradient; as its transpose where b is one of a row-major matrix (a weight)."""
        if kernel == "mm" and b.strides == (1, b.sizes[0]):
            turned = self.aten.transpose(gradient, 0, 1)
            return self.aten.transpose(self.aten.mm(turned, a, called), 0, 1)
        return self.aten.mm(self.aten.transpose(a, -2, -1), gradient, called, kernel=kernel)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
        """x · Wᵀ (+ b) of rows: [..., in] → [..., out]."""
        rows: Dims = (tuple(e for dim in x.dims[:-1] for e in dim), x.dims[-1])
        turned = self.transpose(weight, 0, 1)
        flat = self.view(x, rows)
        if bias is None:
            out = self.matmul(flat, turned, name)
        else:
            out = self._addmm(bias, flat, turned, name)
        return self.view(out, (*x.dims[:-1], weight.dims[0]), name)

    def _addmm(self, bias: Tensor, a: Tensor, b: Tensor, name: str) -> Tensor:
        """bias + a · b: the bias takes the gradient as it is, to be summed over the rows."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            gradient, (a, b) = only(flowed), node.saved
            made: Gradients = [gradient if node.wants[0] else None, None, None]
            if node.wants[1]:
                turned = self.aten.transpose(b, 0, 1)
                made[1] = self.aten.mm(gradient, turned, f"gradient of {node.inputs[1].name}")
            if node.wants[2]:
                called = f"gradient of {node.inputs[2].name}"
                made[2] = self._right_gradient(a, b, gradient, called, "mm")
            return made

        out = self.aten.mm(a, b, name, kernel="addmm")
        return self._record(backward, (bias, a, b), out, (a, b))

    def flash_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        name: str,
        *,
        pairs: Extent,
        cuda: bool,
    ) -> Tensor:
        """Fused attention: saves q, k, v, mask, output and log-sum-exp.

        q [B, H, T, D], k and v [B, G, T, D]; outputs and gradients lie as [B, T, heads, D]. `pairs`
        of query and key are computed, twice forward and five times on the way back (the scores are
        made again). On CUDA the way back has scratch (flash_attn/flash_api.cpp, mha_bwd): a float32
        gradient of q, row sums, and gradients of k and v for every query head.
        """
        kernel = "_scaled_dot_product_flash_attention"
        if not cuda:
            kernel += "_for_cpu"

        def backward(node: Node, flowed: Gradients) -> Gradients:
            made: Gradients = []
            reads = (only(flowed), *node.saved)
            for index, like in enumerate(node.inputs):
                B, H, T, D = like.dims
                first, last = index == 0, index == 2
                lying = self.aten.new(
                    f"{kernel}_backward",
                    f"gradient of {like.name}",
                    (B, T, H, D),
                    like.itemsize,
                    flops=(10, *B, *H, *D, pairs) if first else None,
                    reads=reads if first else (),
                    scratch=_flash_scratch(node.inputs) if last and cuda else (),
                )
                made.append(self.aten.transpose(lying, 1, 2))
            return made

        B, H, T, D = q.dims
        flops = (4, *B, *H, *D, pairs)
        lying = self.aten.new(kernel, name, (B, T, H, D), q.itemsize, flops=flops, reads=(q, k, v))
        out = self.aten.transpose(lying, 1, 2)
        lse = self.aten.new(kernel, "log-sum-exp", (B, H, T), FLOAT32)
        saved = (q, k, v, *(() if mask is None else (mask,)), out, lse)
        return self._record(backward, (q, k, v), out, saved)

    # Tables and the loss

    def embedding(self, table: Tensor, ids: Tensor, name: str) -> Tensor:
        """A row of the table for each id, which are saved; the gradient is a whole table."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            called = f"gradient of {like.name}"
            reads = (only(flowed),)
            return [
                self.aten.new(
                    "embedding_dense_backward", called, like.dims, like.itemsize, reads=reads
                )
            ]

        out = self.aten.new("embedding", name, (*ids.dims, table.dims[1]), table.itemsize)
        return self._record(backward, (table,), out, (ids,))

    def nll_loss(self, log_probabilities: Tensor) -> Tensor:
        """Mean of the labels' negative log-likelihoods [N, V] → []; saves them and the count."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            kept, called = node.saved[0], f"gradient of {node.inputs[0].name}"
            return [self.aten.new("nll_loss_backward", called, kept.dims, kept.itemsize)]

        loss = self.aten.new("nll_loss_forward", "loss", (), FLOAT32, reads=(log_probabilities,))
        count = self.aten.new("nll_loss_forward", "count of labels", (), FLOAT32)
        return self._record(backward, (log_probabilities,), loss, (log_probabilities, count))


def _flash_scratch(inputs: Sequence[Like]) -> list[tuple[Shape, int]]:
    """What mha_bwd of CUDA's flash attention allocates inside: (shape, itemsize)."""
    B, H, T, (D,) = inputs[0].dims
    assert isinstance(D, int)
    rows = (*B, *H, Symbol("ceil128(T)", lambda d: -(-d.tokens // 128) * 128))
    scratch: list[tuple[Shape, int]] = [(rows, FLOAT32), ((*rows, D + -D % 32), FLOAT32)]
    if inputs[1].dims[1] != H:
        scratch += [((*B, *T, *H, D), inputs[0].itemsize)] * 2
    return scratch
