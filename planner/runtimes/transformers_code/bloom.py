"""models/bloom/modeling_bloom.py: attention and feed-forward add the residual themselves."""

from __future__ import annotations

from planner.autograd.tensors import Tensor
from planner.layers import GQA, Dense, Layer
from planner.program import B, T
from planner.runtimes.transformers_code.loops import LoopWriter
from planner.runtimes.transformers_code.regime import Shared


class BloomWriter(LoopWriter):
    """BloomBlock."""

    def bloom_block(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """BloomBlock.forward."""
        assert isinstance(layer.feed_forward, Dense)
        normed = self.norm(layer.norm, x, "attention norm", "attention norm")
        attended, weights = self._bloom_attention(layer, normed, x, given)
        normed = self.norm(layer.norm, attended, "feed-forward norm", "feed-forward norm")
        out = self._bloom_mlp(layer.feed_forward, normed, attended)
        self.loop(weights)
        return out

    def _bloom_attention(
        self, layer: Layer, x: Tensor, residual: Tensor, given: Shared
    ) -> tuple[Tensor, Tensor]:
        """BloomAttention.forward."""
        gqa, f = layer.attention, self.f
        assert isinstance(gqa, GQA)
        assert given.alibi is not None
        H, D = gqa.num_attention_heads, gqa.head_dim
        qkv = self.linear(x, "qkv_proj", 3 * H * D, bias=True)
        apart = f.view(qkv, ((B,), (T,), (H,), (3,), (D,)))
        q, k, v = (f.transpose(f.select(apart, 3), 1, 2) for _ in "qkv")
        del apart
        k, v = self.update(layer, k, v)
        keys = k.dims[2]
        q = f.view(q, ((B, H), (T,), (D,)))
        k = f.transpose(f.view(k, ((B, H), keys, (D,))), 1, 2)
        v = f.view(v, ((B, H), keys, (D,)))
        scores = f.baddbmm(given.alibi, q, k, "scores")
        shaped = f.view(scores, ((B,), (H,), (T,), keys))
        if given.mask is not None:
            shaped = f.add(shaped, given.mask, "masked scores")
        weights = f.cast(self.float32_softmax(shaped), q.itemsize, "attention weights")
        flat = f.view(weights, ((B, H), (T,), keys))
        context = f.matmul(flat, v, "attention", kernel="bmm")
        context = self._merged(context, H)
        out = self.linear(context, "o_proj", self.model.hidden_size, bias=True)
        out = f.add(residual, out, "residual")
        del qkv, scores, shaped, context
        return out, weights

    def _merged(self, x: Tensor, heads: int) -> Tensor:
        """_merge_heads: [B · H, T, D] as [B, T, H · D]."""
        f, width = self.f, x.sizes[-1]
        apart = f.view(x, ((B,), (heads,), (T,), (width,)))
        return f.view(f.transpose(apart, 1, 2), ((B,), (T,), (heads * width,)), "attention")

    def _bloom_mlp(self, dense: Dense, x: Tensor, residual: Tensor) -> Tensor:
        """BloomMLP.forward."""
        hidden = self._activated(dense, x)
        out = self.linear(hidden, "down_proj", self.model.hidden_size, bias=dense.bias)
        return self.f.add(residual, out, "hidden states")

    def _activated(self, dense: Dense, x: Tensor) -> Tensor:
        up = self.linear(x, "up_proj", dense.intermediate_size, bias=dense.bias)
        return self.activate(dense.activation, up)
