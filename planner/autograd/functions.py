"""All differentiable ops together, with tables and the loss."""

from __future__ import annotations

from planner.autograd.autocast import FLOAT32
from planner.autograd.convolutions import Convolutions
from planner.autograd.early_four_bit import EarlyFourBitProducts
from planner.autograd.four_bit import FourBitProducts
from planner.autograd.fused_attention import FusedAttention
from planner.autograd.losses import Losses
from planner.autograd.noise import Noise
from planner.autograd.picking import Picking
from planner.autograd.recording import only
from planner.autograd.sort_scratch import embedding_scratch
from planner.autograd.tensors import Gradients, Node, Tensor
from planner.autograd.unfused_attention import UnfusedAttention


class Functions(
    UnfusedAttention,
    Picking,
    FusedAttention,
    FourBitProducts,
    EarlyFourBitProducts,
    Convolutions,
    Noise,
    Losses,
):
    """The ops of torch.nn.functional that a decoder is made of, recorded in `graph`."""

    def embedding(self, table: Tensor, ids: Tensor, name: str) -> Tensor:
        """A row of the table for each id, which are saved; the gradient is a whole table."""

        def backward(node: Node, flowed: Gradients) -> Gradients:
            like = node.inputs[0]
            called = f"gradient of {like.name}"
            reads = (only(flowed),)
            scratch = (
                embedding_scratch(node.saved[0].shape, *like.sizes) if self.aten.on_gpu else ()
            )
            return [
                self.aten.new(
                    "embedding_dense_backward",
                    called,
                    like.dims,
                    like.itemsize,
                    reads=reads,
                    scratch=scratch,
                )
            ]

        dims = (*ids.dims, table.dims[1])
        rows = [(*(extent for dim in dims for extent in dim), table.itemsize)]
        out = self.aten.new("embedding", name, dims, table.itemsize, rows=rows)
        return self._record(backward, (table,), out, (ids,))

    def cross_entropy(self, logits: Tensor, *labels: Tensor) -> Tensor:
        """F.cross_entropy of [N, V].

        A CPU's float32 list has it as a whole, a GPU's what follows the logarithms alone: their
        dtype is named (ATen/native/LossNLL.cpp, cross_entropy_loss).
        """
        casts = self.low is not None and not self.widens
        wide = self.cast(logits, FLOAT32, "float32 logits") if casts else logits
        logs, b = "log-probabilities", wide.itemsize
        loss = self.nll_loss(self.softmax(wide, logs, kernel="_log_softmax", to=b), *labels)
        del wide
        return loss

    def nll_loss(self, log_probabilities: Tensor, *labels: Tensor) -> Tensor:
        """Mean of the labels' negative log-likelihoods [N, V] → []; saves them and the count.

        `labels` that were made in the step are saved, too.
        """

        def backward(node: Node, flowed: Gradients) -> Gradients:
            kept, called = node.saved[0], f"gradient of {node.inputs[0].name}"
            return [self.aten.new("nll_loss_backward", called, kept.dims, kept.itemsize)]

        if self.low is not None:  # on every device's float32 list
            log_probabilities = self.cast(log_probabilities, FLOAT32, "float32 log-probabilities")
        b, reads = log_probabilities.itemsize, (log_probabilities,)
        loss = self.aten.new("nll_loss_forward", "loss", (), b, reads=reads)
        count = self.aten.new("nll_loss_forward", "count of labels", (), b)
        return self._record(
            backward, (log_probabilities,), loss, (log_probabilities, count, *labels)
        )
