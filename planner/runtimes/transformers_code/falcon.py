"""models/falcon/modeling_falcon.py: its own attention, with rotary positions or ALiBi."""

from __future__ import annotations

from planner.autograd.tensors import Dims, Tensor
from planner.layers import GQA, Dense, Layer
from planner.program import B, T
from planner.runtimes.transformers_code.loops import LoopWriter
from planner.runtimes.transformers_code.regime import Shared
from planner.runtimes.writer import FLOAT32


class FalconWriter(LoopWriter):
    """FalconDecoderLayer."""

    def falcon_block(self, layer: Layer, x: Tensor, given: Shared) -> Tensor:
        """FalconDecoderLayer.forward."""
        f, residual = self.f, x
        assert isinstance(layer.feed_forward, Dense)
        normed = self.norm(layer.norm, x, "attention norm", "attention norm")
        second = normed
        if layer.placement == "parallel-two":
            second = self.norm(layer.norm, x, "feed-forward norm", "feed-forward norm")
        attended, weights = self._falcon_attention(layer, normed, given)
        if layer.placement == "pre":
            residual = f.add(x, attended, "residual")
            second = self.norm(layer.norm, residual, "feed-forward norm", "feed-forward norm")
        fed = self.feed_forward(layer.feed_forward, second)
        if layer.placement != "pre":
            fed = f.add_(fed, attended)
        out = f.add(residual, fed, "hidden states")
        self.loop(weights)
        return out

    def _falcon_attention(
        self, layer: Layer, x: Tensor, given: Shared
    ) -> tuple[Tensor, Tensor | None]:
        """FalconAttention.forward."""
        gqa, f = layer.attention, self.f
        assert isinstance(gqa, GQA)
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        qkv = self.linear(x, "qkv_proj", (H + 2 * G) * D, bias=gqa.qkv_bias)
        q, k, v = self._split_heads(gqa, qkv)
        if given.rotation is not None and given.alibi is None:
            q, k = self.rotated(q, k, given.rotation)
        k, v = self.update(layer, k, v)
        flat: Dims = ((B,), (T,), (H * D,))
        if self.what.attention == "sdpa":
            out = f.view(f.transpose(self.fused(gqa, q, k, v, given.mask), 1, 2), flat)
            return self.linear(out, "o_proj", self.model.hidden_size, bias=gqa.o_bias), None
        assert given.mask is not None
        scores = f.pairs(q, f.transpose(k, 2, 3), "scores")
        if given.alibi is None:
            scores = f.scale_(scores, kernel="div_.Tensor")
            weights = f.softmax(
                f.add(scores, given.mask, "masked scores"), "attention weights", to=self.b
            )
            del scores
            out = f.view(f.transpose(f.pairs(weights, v, "attention"), 1, 2), flat)
            return self.linear(out, "o_proj", self.model.hidden_size, bias=gqa.o_bias), weights
        wide = f.cast(scores, FLOAT32, "float32 scores")
        logits = f.scale_(f.add(wide, given.alibi, "scores + alibi"))
        masked = f.add(logits, given.mask, "masked scores")
        weights = self._narrow_softmax(masked)
        del masked
        out = f.view(f.transpose(f.pairs(weights, v, "attention"), 1, 2), flat)
        out = self.linear(out, "o_proj", self.model.hidden_size, bias=gqa.o_bias)
        del scores, wide, logits
        return out, weights

    def _narrow_softmax(self, scores: Tensor) -> Tensor:
        """F.softmax(scores, dtype=hidden_states.dtype)."""
        return self.f.softmax(scores, "attention weights", to=self.b)

    def _split_heads(self, gqa: GQA, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """_split_heads: [B, heads, T, D]; grouped keys and values are repeated for all heads."""
        f, H, G, D = self.f, gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        lead: Dims = ((B,), (T,))
        if gqa.cache_heads is not None:
            apart = f.view(qkv, (*lead, (G,), (H // G + 2,), (D,)))
            q = f.narrow(apart, H // G, 3)
            k, v = f.pick(apart, 3, "keys"), f.pick(apart, 3, "values")
            wide = (*lead, (G,), (H // G,), (D,))
            k, v = f.expand(k, wide), f.expand(v, wide)
            parts = [f.view(part, (*lead, (H,), (D,))) for part in (q, k, v)]
        elif gqa.interleaved_qkv or H == 1:
            apart = f.view(qkv, (*lead, (H,), (3,), (D,)))
            parts = [f.select(apart, 3) for _ in "qkv"]
        else:
            apart = f.view(qkv, (*lead, (H + 2,), (D,)))
            parts = [f.narrow(apart, H, 2), f.pick(apart, 2, "keys"), f.pick(apart, 2, "values")]
        q, k, v = (f.transpose(part, 1, 2) for part in parts)
        return q, k, v
