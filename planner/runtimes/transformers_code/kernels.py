"""Scores, softmax, values: integrations/sdpa_attention.py and eager_attention_forward."""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.fused_attention import fused_kernel
from planner.autograd.tensors import Dims, Tensor
from planner.layers import GQA, MLA
from planner.program import B, Symbol, visible_pairs
from planner.runtimes.transformers_code.positions import PositionWriter
from planner.runtimes.transformers_code.regime import Shared
from planner.runtimes.writer import BOOL, FLOAT32

GROUPED_WIDTH = 256
"""Head dims up to this attend in groups without a mask (sdpa_attention.use_gqa_in_sdpa)."""


class KernelWriter(PositionWriter):
    """Attention of queries [B, H, T, D] to keys and values [B, G, keys, D]."""

    def attend(
        self, attention: GQA | MLA, q: Tensor, k: Tensor, v: Tensor, given: Shared
    ) -> tuple[Tensor, Tensor | None]:
        """([B, T, H, D], the weights that eager attention returns)."""
        if self.what.attention == "eager":
            return self.eager(attention, q, k, v, given)
        return self.sdpa(attention, q, k, v, given), None

    def sdpa(self, attention: GQA | MLA, q: Tensor, k: Tensor, v: Tensor, given: Shared) -> Tensor:
        """sdpa_attention_forward: where grouped heads are not allowed, they are repeated.

        One query alone is packed beside those of its group instead.
        """
        f, mask = self.f, given.mask
        heads, G = q.dims[1], k.dims[1]
        grouped = mask is None and k.sizes[-1] == v.sizes[-1] <= GROUPED_WIDTH
        one = self.aten.sizes((q.dims[2],)) == (1,)
        if q.sizes[1] != k.sizes[1] and not grouped:
            if one:
                share = q.sizes[1] // k.sizes[1]
                q = f.view(q, (q.dims[0], G, (share,), q.dims[3]))
            else:
                k = f.repeated(k, q.sizes[1], "all keys")
                v = f.repeated(v, q.sizes[1], "all values")
        enable_gqa = q.sizes[1] != k.sizes[1]
        out = self.fused(attention, q, k, v, mask, enable_gqa=enable_gqa)
        if out.dims[1] != heads:
            out = f.view(out, (out.dims[0], heads, ONE, out.dims[3]))
        return f.contiguous(f.transpose(out, 1, 2), "attention")

    def fused(
        self,
        attention: GQA | MLA,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        enable_gqa: bool = False,
        pairs: Symbol | None = None,
    ) -> Tensor:
        """F.scaled_dot_product_attention; `pairs` of query and key, causal ones where not said."""
        f, window = self.f, None
        mask = None if mask is None else f.lowered(mask)
        v = f.lowered(v)
        k = f.lowered(k)
        q = f.lowered(q)
        kernel = fused_kernel(self.what.device, self.what.capability, q.itemsize)
        if kernel != "cpu" and mask is not None and mask.node is not None:
            kernel = "efficient"  # the one with a gradient for it
        if isinstance(attention, GQA) and mask is not None:
            window = attention.sliding_window
        added = None
        if mask is not None and mask.itemsize == BOOL:
            reads = (mask, *(self.aten.number("mask", q.itemsize) for _ in ("0", "-inf")))
            everyone: Dims = ((B,), *mask.dims[1:])  # the bool mask is one for all sequences
            added = self.aten.new("where.self", "mask", everyone, q.itemsize, reads=reads)
            del reads
        elif mask is not None:
            added = mask
        unequal = k.sizes[-1] != v.sizes[-1] or (k.sizes[1] != q.sizes[1] and mask is not None)
        grouped = k.sizes[1] != q.sizes[1]
        if (kernel == "cpu" and unequal) or (kernel == "efficient" and grouped):
            with f.outside_autocast():
                return f.math_attention(q, k, v, added, enable_gqa=enable_gqa)
        return f.fused_attention(
            q,
            k,
            v,
            added,
            "attention",
            pairs=pairs or visible_pairs(window),
            kernel=kernel,
            trains=any(x.node is not None for x in (q, k, v)),
        )

    def eager(
        self, attention: GQA | MLA, q: Tensor, k: Tensor, v: Tensor, given: Shared
    ) -> tuple[Tensor, Tensor]:
        """eager_attention_forward: every step a [B, H, T, keys] tensor."""
        f = self.f
        k = f.repeated(k, q.sizes[1], "all keys")
        v = f.repeated(v, q.sizes[1], "all values")
        scores = f.scale(f.pairs(q, f.transpose(k, 2, 3), "scores"), "scores")
        if isinstance(attention, GQA) and attention.logit_softcap is not None:
            scores = f.scale(scores, "softcap", kernel="div.Tensor")
            scores = f.pointwise(scores, "softcap", "tanh", saves="result")
            scores = f.scale(scores, "softcap")
        if given.mask is not None:
            scores = f.add(scores, given.mask, "masked scores")
        if self.code.softmax == "narrow":
            scores = f.softmax(scores, "attention weights")
            scores = f.cast(scores, v.itemsize, "attention weights")
        else:
            scores = f.cast(self.float32_softmax(scores), q.itemsize, "attention weights")
        out = f.pairs(scores, v, "attention")
        out = f.transpose(out, 1, 2)
        if self.code.block == "gpt2":
            return out, scores
        return f.contiguous(out, "attention"), scores

    def float32_softmax(self, scores: Tensor) -> Tensor:
        """F.softmax(scores, dtype=torch.float32)."""
        return self.f.softmax(scores, "attention weights", to=FLOAT32)
