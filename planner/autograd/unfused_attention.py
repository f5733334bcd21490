"""Attention in parts: scores, softmax and values one after the other, as [B, H, T, keys] tensors.

Where no fused kernel takes the tensors torch runs `_scaled_dot_product_attention_math`
(ATen/native/transformers/attention.cpp of torch 2.13), of torch's own differentiable ops: on a GPU
for grouped heads in float32, on a CPU for values of another width than keys.
"""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.elementwise import BOOL, Elementwise
from planner.autograd.products import FLOAT32, Products
from planner.autograd.reductions import Reductions
from planner.autograd.tensors import Dims, Tensor


class UnfusedAttention(Elementwise, Reductions, Products):
    """Products of heads, heads repeated, and the whole as torch puts it together."""

    def pairs(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """torch.matmul of [B, H, …] tensors, both there until it ends: B · H products."""
        pairs = (*a.dims[0], *a.dims[1])
        right = self.lowered(b)
        left = self.lowered(a)
        if left.sizes[1] != right.sizes[1]:
            right = self.expand(right, (*left.dims[:2], *right.dims[2:]))
        flat_a = self.view(left, (pairs, *left.dims[2:]))
        flat_b = self.view(right, (pairs, *right.dims[2:]))
        out = self.matmul(flat_a, flat_b, name, kernel="bmm")
        return self.view(out, (*a.dims[:-1], b.dims[-1]))

    def repeated(self, x: Tensor, heads: int, name: str, *, copied: bool = False) -> Tensor:
        """[B, G, keys, D] for every query head: a copy where it cannot be a view.

        As transformers' repeat_kv; `copied`: as torch's repeat_interleave, always a copy.
        """
        H, G = heads, x.sizes[1]
        if H == G:
            return x
        batch, _, tokens, width = x.dims
        apart = self.view(x, (batch, (G,), ONE, tokens, width))
        spread = self.expand(apart, (batch, (G,), (H // G,), tokens, width))
        if copied:
            spread = self.contiguous(spread, name)
        return self.view(spread, (batch, (H,), tokens, width), name)

    def math_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, enable_gqa: bool = False
    ) -> Tensor:
        """All of it in float32, causal without a mask; its names live until it returns.

        `enable_gqa`: heads of keys are repeated, else one may serve all queries as it is. The mask
        is added in place, but where ops are watched.
        """
        aten, b = self.aten, q.itemsize
        causal = mask is None and q.sizes[2] > 1
        wide, k, v = (self.cast(x, FLOAT32, f"float32 {x.name}") for x in (q, k, v))
        q = self.scale(wide, "scaled queries")
        if causal:
            square: Dims = (q.dims[2], k.dims[2])
            lower = aten.new("ones", "mask", square, BOOL)
            lower = aten.new("tril", "mask", square, BOOL, reads=(lower,))
            reads = (lower, *(aten.number("mask", FLOAT32) for _ in ("0", "-inf")))
            mask = aten.new("where.self", "mask", square, FLOAT32, reads=reads)
            del lower, reads
        heads = q.sizes[1] if enable_gqa else k.sizes[1]
        all_k = self.repeated(k, heads, "all keys", copied=True)
        all_v = self.repeated(v, heads, "all values", copied=True)
        scores = self.pairs(q, self.scale(self.transpose(all_k, 2, 3), "scaled keys"), "scores")
        if mask is not None and aten.watched:
            scores = self.add(scores, mask, "masked scores")
        elif mask is not None:
            scores = self.add_(scores, mask)
        weights = self.softmax(scores, "attention weights", kernel="_safe_softmax")
        self._look_for_hidden_rows(scores)
        del scores
        narrow = self.cast(weights, b, "attention weights")  # the second result
        out = self.pairs(weights, all_v, "attention")
        out = self.cast(out, b, "attention")
        del narrow, wide, all_k, all_v
        return out

    def _look_for_hidden_rows(self, scores: Tensor) -> None:
        """What _safe_softmax makes inside itself: which scores are −∞, in which rows all are.

        The result is written over softmax's own, as an H200's allocator shows (record 986371b73a96:
        each byte reserved is accounted for).
        """
        if self.aten.on_gpu:
            hidden = self.aten.new("isneginf", "hidden scores", scores.dims, BOOL, reads=(scores,))
            last = (*scores.dims[:-1], ONE)
            rows = self.aten.new("all.dim", "hidden rows", last, BOOL, reads=(hidden,))
            zero = self.aten.number("zero", scores.itemsize)
            del zero, rows, hidden
