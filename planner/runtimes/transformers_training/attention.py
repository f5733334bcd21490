"""Attention: the projections of each type, rotary positions, sdpa_attention.py, eager."""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.tensors import Dims, Tensor
from planner.layers import GQA
from planner.program import B, T, visible_pairs
from planner.runtimes.transformers_training.parts import PartWriter
from planner.runtimes.transformers_training.regime import Shared
from planner.runtimes.writer import FLOAT32

JOINED_ROTARY = frozenset(("phi3",))
"""Types that join the turned dimensions with the others, though there may be none."""


class AttentionWriter(PartWriter):
    """Attention of one decoder layer."""

    def attention(self, gqa: GQA, x: Tensor, given: Shared) -> Tensor:
        """<Type>Attention.forward."""
        f, h = self.f, self.model.hidden_size
        H, D = gqa.num_attention_heads, gqa.head_dim
        q, k, v = self._project(gqa, x)
        if given.rotation is not None and gqa.rope:
            q = self._rotate(q, given.rotation, "query")
            k = self._rotate(k, given.rotation, "key")
        attend = self._eager if self.step.attention == "eager" else self._sdpa
        out = attend(gqa, q, k, v, given)
        out = f.view(out, ((B,), (T,), (H * D,)))
        return self.linear(out, "o_proj", h, bias=gqa.o_bias)

    def _project(self, gqa: GQA, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, D], keys and values [B, G, T, D], one after the other."""
        f, D = self.f, gqa.head_dim
        heads = (gqa.num_attention_heads, gqa.num_key_value_heads, gqa.num_key_value_heads)
        if gqa.fused_qkv:  # phi3: three slices
            qkv = self.linear(x, "qkv_proj", sum(heads) * D, bias=gqa.qkv_bias)
            parts = [f.narrow(qkv, n * D) for n in heads]
            del qkv
            q, k, v = (
                f.transpose(f.view(part, ((B,), (T,), (n,), (D,))), 1, 2)
                for part, n in zip(parts, heads, strict=True)
            )
            return q, k, v
        if gqa.qk_norm is not None and gqa.qk_norm.width == "full":  # olmo2: first all three
            letters = zip("qkv", heads, strict=True)
            flat = [self._projected(gqa, x, letter, n) for letter, n in letters]
            q, k, v = (
                f.transpose(f.view(part, ((B,), (T,), (n,), (D,))), 1, 2)
                for part, n in zip(flat, heads, strict=True)
            )
            return q, k, v
        q, k, v = (
            f.transpose(self._by_heads(gqa, x, letter, n), 1, 2)
            for letter, n in zip("qkv", heads, strict=True)
        )
        return q, k, v

    def _projected(self, gqa: GQA, x: Tensor, letter: str, heads: int) -> Tensor:
        """One projection [B, T, heads · D], normed where the norm is over all heads."""
        bias = gqa.qkv_bias and letter not in gqa.unbiased
        out = self.linear(x, f"{letter}_proj", heads * gqa.head_dim, bias=bias)
        norm = gqa.qk_norm
        if norm is None or norm.width != "full" or letter == "v":
            return out
        return self.norm(norm.norm, out, f"{letter} norm", f"{letter}_norm")

    def _by_heads(self, gqa: GQA, x: Tensor, letter: str, heads: int) -> Tensor:
        """One projection [B, T, heads, D], normed where the norm is over each head."""
        shape: Dims = ((B,), (T,), (heads,), (gqa.head_dim,))
        out = self.f.view(self._projected(gqa, x, letter, heads), shape)
        norm = gqa.qk_norm
        if norm is None or norm.width != "head" or letter == "v":
            return out
        return self.norm(norm.norm, out, f"{letter} norm", f"{letter}_norm")

    def _rotate(self, x: Tensor, rotation: tuple[Tensor, Tensor], name: str) -> Tensor:
        """apply_rotary_pos_emb with rotate_half; the rest is joined behind it."""
        f, D = self.f, x.sizes[-1]
        cos, sin = rotation
        R = cos.sizes[-1]
        if R == D and self.model.text_type not in JOINED_ROTARY:
            return self._turned(x, cos, sin, name)
        turned = self._turned(f.narrow(x, R), cos, sin, name)
        return f.cat((turned, f.narrow(x, D - R)), x.dims, f"rotated {name}")

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor, name: str) -> Tensor:
        """In the tables' dtype, then rounded: olmo's are float32."""
        f = self.f
        turned = f.add(
            f.mul(x, cos, f"{name} · cos"),
            f.mul(self._half(x, name), sin, f"{name} turned · sin"),
            f"rotated {name}",
        )
        return f.cast(turned, self.b, f"rotated {name}")

    def _half(self, x: Tensor, name: str) -> Tensor:
        """rotate_half: two slices, the second negated, first."""
        f, R = self.f, x.sizes[-1]
        first, second = f.narrow(x, R // 2), f.narrow(x, R // 2)
        halves = (f.scale(second, f"{name}, negated", kernel="neg"), first)
        return f.cat(halves, x.dims, f"{name} turned")

    def _repeated(self, gqa: GQA, x: Tensor, name: str) -> Tensor:
        """repeat_kv: a copy of keys or values for every query head."""
        f = self.f
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        if H == G:
            return x
        apart = f.view(x, ((B,), (G,), ONE, (T,), (D,)))
        spread = f.expand(apart, ((B,), (G,), (H // G,), (T,), (D,)))
        return f.view(spread, ((B,), (H,), (T,), (D,)), name)

    def _sdpa(self, gqa: GQA, q: Tensor, k: Tensor, v: Tensor, given: Shared) -> Tensor:
        """sdpa_attention_forward: heads are repeated where a mask forbids grouped ones."""
        f, added = self.f, given.mask
        if added is not None:
            k, v = (
                self._repeated(gqa, x, name) for x, name in ((k, "all keys"), (v, "all values"))
            )
            reads = (added, *(self.aten.number("mask", self.b) for _ in ("0", "-inf")))
            everyone: Dims = ((B,), ONE, (T,), (T,))  # the bool mask is one for all sequences
            added = self.aten.new("where.self", "mask", everyone, self.b, reads=reads)
            del reads
        pairs = visible_pairs(gqa.sliding_window if added is not None else None)
        cuda = self.step.device == "cuda"
        out = f.flash_attention(q, k, v, added, "attention", pairs=pairs, cuda=cuda)
        return f.transpose(out, 1, 2)

    def _eager(self, gqa: GQA, q: Tensor, k: Tensor, v: Tensor, given: Shared) -> Tensor:
        """eager_attention_forward."""
        f = self.f
        H = gqa.num_attention_heads
        k, v = self._repeated(gqa, k, "all keys"), self._repeated(gqa, v, "all values")
        scores = f.scale(self._pairs(q, f.transpose(k, 2, 3), "scores"), "scores")
        if gqa.logit_softcap is not None:
            scores = f.scale(scores, "softcap", kernel="div.Tensor")
            scores = f.pointwise(scores, "softcap", "tanh", saves="result")
            scores = f.scale(scores, "softcap")
        if given.mask is not None:
            scores = f.add(scores, given.mask, "masked scores")
        wide = f.softmax(f.cast(scores, FLOAT32, "float32 scores"), "softmax")
        del scores
        weights = f.cast(wide, self.b, "attention weights")
        del wide
        out = self._pairs(weights, v, "attention")
        assert out.dims[1] == (H,)
        out = f.transpose(out, 1, 2)
        return f.contiguous(out, "attention")

    def _pairs(self, a: Tensor, b: Tensor, name: str) -> Tensor:
        """torch.matmul of [B, H, …] tensors: one product for each of B · H."""
        f, pairs = self.f, (*a.dims[0], *a.dims[1])
        flat_a = f.view(a, (pairs, *a.dims[2:]))
        flat_b = f.view(b, (pairs, *b.dims[2:]))
        out = f.matmul(flat_a, flat_b, name, kernel="bmm")
        return f.view(out, (*a.dims[:-1], b.dims[-1]))
