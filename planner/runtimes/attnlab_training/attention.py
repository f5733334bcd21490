"""attention.py and implementations.py of attnlab."""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.fused_attention import fused_kernel
from planner.autograd.tensors import Dims, Tensor
from planner.layers import GQA, QKNorm
from planner.program import B, Shape, T, visible_pairs
from planner.runtimes.attnlab_training.positions import PositionWriter
from planner.runtimes.attnlab_training.regime import T_AND_SINK, Shared, window_of
from planner.runtimes.writer import FLOAT32


class AttentionWriter(PositionWriter):
    """Projections, norms, rotation, attention and output projection of one block."""

    def attention(self, gqa: GQA, x: Tensor, given: Shared) -> Tensor:
        """Attention.forward."""
        f, h = self.f, self.model.hidden_size
        H, D = gqa.num_attention_heads, gqa.head_dim
        q, k, v = self._project(gqa, x)
        if given.rotation is not None:
            q = self.rotate(q, given.rotation, "query")
            k = self.rotate(k, given.rotation, "key")
        if gqa.qk_norm is not None and gqa.qk_norm.after_rope:
            q, k = self._normed(gqa.qk_norm, q, k)
        q, k, v = f.transpose(q, 1, 2), f.transpose(k, 1, 2), f.transpose(v, 1, 2)
        attend = self._naive if self.step.attention == "naive" else self._sdpa
        out = attend(gqa, q, k, v, given)
        del q, k, v
        out = f.view(f.transpose(out, 1, 2), ((B,), (T,), (H * D,)))
        return self.linear(out, "o_proj", h, bias=gqa.o_bias)

    def _project(self, gqa: GQA, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention._project: by heads, normed and clipped."""
        f = self.f
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        if gqa.fused_qkv:
            q, k, v = self._split(
                gqa, self.linear(x, "qkv_proj", (H + 2 * G) * D, bias=gqa.qkv_bias)
            )
        else:
            q, k, v = (
                self.linear(
                    x,
                    f"{letter}_proj",
                    heads * D,
                    bias=gqa.qkv_bias and letter not in gqa.unbiased,
                )
                for letter, heads in (("q", H), ("k", G), ("v", G))
            )
        norm = None if gqa.qk_norm is None or gqa.qk_norm.after_rope else gqa.qk_norm
        if norm is not None and norm.width == "full":
            q, k = self._normed(norm, q, k)
        if gqa.clip_qkv is not None:
            q, k, v = (f.clamp(part, f"clipped {part.name}") for part in (q, k, v))
        q, k, v = (
            f.view(part, ((B,), (T,), (heads,), (D,))) for part, heads in ((q, H), (k, G), (v, G))
        )
        if norm is not None and norm.width != "full":
            q, k = self._normed(norm, q, k)
        return q, k, v

    def _split(self, gqa: GQA, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attention._split: all of q, k, v; or kv head by kv head, which copies."""
        f = self.f
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        if not gqa.interleaved_qkv:
            q, k, v = f.split(qkv, (H * D, G * D, G * D))
            return q, k, v
        shared = H // G
        by_heads = f.view(qkv, ((B,), (T,), (G,), (shared + 2,), (D,)))
        q, k, v = (
            f.view(part, ((B,), (T,), (heads * D,)))
            for part, heads in zip(f.split(by_heads, (shared, 1, 1), -2), (H, G, G), strict=True)
        )
        return q, k, v

    def _normed(self, norm: QKNorm, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both, before the projections go."""
        normed = self.qk_norm(norm, q, "query norm", "q_norm")
        return normed, self.qk_norm(norm, k, "key norm", "k_norm")

    def _naive(self, gqa: GQA, q: Tensor, k: Tensor, v: Tensor, given: Shared) -> Tensor:
        """implementations.naive: float32 throughout, scores [B, G, H/G·T, T] kept in full."""
        f, kept = self.f, q.itemsize
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        bias, visible = (given.mask, None) if self.is_biased else (None, given.mask)
        if given.mask is None and self.regime.several_tokens:
            visible = self.visible(given.positions, None)
        wide = f.scale(f.cast(q, FLOAT32, "float32 query"), "float32 query")
        rows: Shape = (H // G, T)
        folded = f.view(wide, ((B,), (G,), rows, (D,)))
        del wide
        keys = f.transpose(f.cast(k, FLOAT32, "float32 keys"), -2, -1)
        scores = f.pairs(folded, keys, "scores")
        del folded, keys
        if gqa.logit_softcap is not None:
            scores = f.pointwise(scores, "softcap", "tanh", saves="result")
            scores = f.scale(scores, "softcap")
        square = ((B,), (H,), (T,), (T,))
        if bias is not None:
            scores = f.add(f.view(scores, square), bias, "biased scores")
        if visible is not None:
            scores = f.where(visible, f.view(scores, square), "masked scores")
        if gqa.sinks:
            beside = self._sinks(H)
            whole: Dims = (*square[:3], (T_AND_SINK,))
            scores = f.cat((f.view(scores, square), beside), whole, "scores and sinks")
            scores = f.view(f.narrow(f.softmax(scores, "softmax"), T), ((B,), (G,), rows, (T,)))
        else:
            scores = f.softmax(f.view(scores, ((B,), (G,), rows, (T,))), "softmax")
        out = f.pairs(scores, f.cast(v, FLOAT32, "float32 values"), "attention")
        out = f.view(out, ((B,), (H,), (T,), (D,)))
        return f.cast(out, kept, "attention")

    def _sinks(self, H: int) -> Tensor:
        """A column beside the scores, [B, H, T, 1]: a view."""
        f = self.f
        wide = f.cast(self.weight("sinks", H), FLOAT32, "float32 sinks")
        return f.expand(f.view(wide, ((H,), ONE, ONE)), ((B,), (H,), (T,), ONE))

    def _sdpa(self, gqa: GQA, q: Tensor, k: Tensor, v: Tensor, given: Shared) -> Tensor:
        """scaled_dot_product_attention, flash where it is allowed to, in parts in float32."""
        added = given.mask
        if added is not None:
            added = self.f.lowered(added)
        v = self.f.lowered(v)
        k = self.f.lowered(k)
        q = self.f.lowered(q)
        if added is not None and not self.is_biased:  # a bool mask becomes one of q's dtype
            reads = (added, *(self.aten.number("mask", q.itemsize) for _ in ("0", "-inf")))
            added = self.aten.new("where.self", "mask", added.dims, q.itemsize, reads=reads)
            del reads
        kernel = fused_kernel(self.step.device, self.step.capability, q.itemsize)
        if kernel == "efficient" and k.sizes[1] != q.sizes[1]:
            with self.f.outside_autocast():
                return self.f.math_attention(q, k, v, added, enable_gqa=True)
        return self.f.fused_attention(
            q,
            k,
            v,
            added,
            "attention",
            pairs=visible_pairs(window_of(gqa)),
            kernel=kernel,
            trains=True,
        )
