"""Scores, softmax, values: integrations/sdpa_attention.py and eager_attention_forward."""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.fused_attention import fused_kernel
from planner.autograd.tensors import Dims, Tensor
from planner.layers import GQA, MLA
from planner.program import B, visible_pairs
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
                k = self.repeated(k, q.sizes[1], "all keys")
                v = self.repeated(v, q.sizes[1], "all values")
        out = self.fused(attention, q, k, v, mask)
        if out.dims[1] != heads:
            out = f.view(out, (out.dims[0], heads, ONE, out.dims[3]))
        return f.contiguous(f.transpose(out, 1, 2), "attention")

    def fused(
        self, attention: GQA | MLA, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """F.scaled_dot_product_attention."""
        f, window = self.f, None
        mask = None if mask is None else f.lowered(mask)
        v = f.lowered(v)
        k = f.lowered(k)
        q = f.lowered(q)
        kernel = fused_kernel(self.what.device, self.what.capability, q.itemsize)
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
                return self._math(q, k, v, added)
        return f.fused_attention(
            q,
            k,
            v,
            added,
            "attention",
            pairs=visible_pairs(window),
            kernel=kernel,
            trains=any(x.node is not None for x in (q, k, v)),
        )

    def repeated(self, x: Tensor, heads: int, name: str) -> Tensor:
        """repeat_kv: a copy of keys or values for every query head."""
        f = self.f
        H, G = heads, x.sizes[1]
        if H == G:
            return x
        batch, _, tokens, width = x.dims
        apart = f.view(x, (batch, (G,), ONE, tokens, width))
        spread = f.expand(apart, (batch, (G,), (H // G,), tokens, width))
        return f.view(spread, (batch, (H,), tokens, width), name)

    def eager(
        self, attention: GQA | MLA, q: Tensor, k: Tensor, v: Tensor, given: Shared
    ) -> tuple[Tensor, Tensor]:
        """eager_attention_forward: every step a [B, H, T, keys] tensor."""
        f = self.f
        k = self.repeated(k, q.sizes[1], "all keys")
        v = self.repeated(v, q.sizes[1], "all values")
        scores = f.scale(self.pairs(q, f.transpose(k, 2, 3), "scores"), "scores")
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
        out = self.pairs(scores, v, "attention")
        out = f.transpose(out, 1, 2)
        if self.code.block == "gpt2":
            return out, scores
        return f.contiguous(out, "attention"), scores

    def float32_softmax(self, scores: Tensor) -> Tensor:
        """F.softmax(scores, dtype=torch.float32)."""
        return self.f.softmax(scores, "attention weights", to=FLOAT32)

    def pairs(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """torch.matmul of [B, H, …] tensors: one product for each of B · H."""
        f, pairs = self.f, (*a.dims[0], *a.dims[1])
        b = f.lowered(b)
        a = f.lowered(a)
        if a.sizes[1] != b.sizes[1]:
            b = f.expand(b, (*a.dims[:2], *b.dims[2:]))
        flat_a = f.view(a, (pairs, *a.dims[2:]))
        flat_b = f.view(b, (pairs, *b.dims[2:]))
        out = f.matmul(flat_a, flat_b, name, kernel="bmm")
        return f.view(out, (*a.dims[:-1], b.dims[-1]))

    def _math(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """at::_scaled_dot_product_attention_math: all of it in float32.

        The mask is added out of place, as it is wherever ops are watched.
        """
        f, aten, b = self.f, self.aten, q.itemsize
        causal = mask is None and q.sizes[2] > 1
        wide, k, v = (f.cast(x, FLOAT32, f"float32 {x.name}") for x in (q, k, v))
        q = f.scale(wide, "scaled queries")
        if causal:
            square: Dims = (q.dims[2], k.dims[2])
            lower = aten.new("ones", "mask", square, BOOL)
            lower = aten.new("tril", "mask", square, BOOL, reads=(lower,))
            mask = aten.new("where.self", "mask", square, FLOAT32, reads=(lower,))
            del lower
        scores = self.pairs(q, f.scale(f.transpose(k, 2, 3), "scaled keys"), "scores")
        if mask is not None:
            scores = f.add(scores, mask, "masked scores")
        weights = f.softmax(scores, "attention weights", kernel="_safe_softmax")
        del scores
        narrow = f.cast(weights, b, "attention weights")  # the second result
        out = self.pairs(weights, v, "attention")
        out = f.cast(out, b, "attention")
        del narrow, wide
        return out
