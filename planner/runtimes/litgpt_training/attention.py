"""CausalSelfAttention and apply_rope (lit_gpt/model.py)."""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.fused_attention import fused_kernel
from planner.autograd.tensors import Dims, Tensor
from planner.layers import GQA
from planner.program import B, Symbol, T, visible_pairs
from planner.runtimes.litgpt_training.linear import LinearWriter
from planner.runtimes.litgpt_training.regime import Shared
from planner.runtimes.writer import BOOL, FLOAT32
from planner.trained.prefix_adapters import PROMPT_TOKENS


class AttentionWriter(LinearWriter):
    """Attention of one block."""

    def attention(self, gqa: GQA, x: Tensor, given: Shared) -> Tensor:
        """CausalSelfAttention.forward without a cache."""
        f, h = self.f, self.model.hidden_size
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        shared = H // G
        qkv = self.qkv(gqa, x)
        by_heads = f.view(qkv, ((B,), (T,), (G,), (shared + 2,), (D,)))
        qkv = f.permute(by_heads, (0, 2, 3, 1, 4))
        del by_heads
        q, k, v = f.split(qkv, (shared, 1, 1), 2)
        if G != H:
            wide: Dims = ((B,), (G,), (shared,), (T,), (D,))
            k, v = f.expand(k, wide), f.expand(v, wide)
        rows: Dims = ((B,), (H,), (T,), (D,))
        q = f.view(q, rows)
        k = f.view(k, rows)
        v = f.view(v, rows)
        n = given.cos.sizes[-1]
        q_roped = self._roped(f.narrow(q, n), given, "query")
        k_roped = self._roped(f.narrow(k, n), given, "key")
        q = f.cat((q_roped, f.narrow(q, D - n)), rows, "query")
        k = f.cat((k_roped, f.narrow(k, D - n)), rows, "key")
        y = f.transpose(self._attend(q, k, v), 1, 2)
        if self.prefixed:
            y = self._with_prefix(gqa, q, y)
        y = f.view(y, ((B,), (T,), (h,)))
        return self.linear(y, "o_proj", h, bias=gqa.o_bias)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """scaled_dot_product_attention(..., is_causal=True)."""
        return self.f.fused_attention(
            q,
            k,
            v,
            None,
            "attention",
            pairs=visible_pairs(None),
            kernel=fused_kernel(self.step.device, self.step.capability, q.itemsize),
            trains=True,
        )

    def _with_prefix(self, gqa: GQA, q: Tensor, y: Tensor) -> Tensor:
        """adapter.CausalSelfAttention.scaled_dot_product_attention: attention to a prefix, too."""
        f, H = self.f, gqa.num_attention_heads
        ones = self.aten.new("ones", "mask of the prefix", ((T,), (PROMPT_TOKENS,)), BOOL)
        prefixed = f.transpose(self._attend_prefix(gqa, q, ones.detach()), 1, 2)
        gate = self.beside("gating_factor", 1, 1, H, 1)
        return f.add(y, f.mul(gate, prefixed, "prefix, gated"), "attention with prefix")

    def _attend_prefix(self, gqa: GQA, q: Tensor, ones: Tensor) -> Tensor:
        """A mask of ones keeps flash attention off; a batch, or one key head, any fused kernel."""
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        aten, A = self.aten, PROMPT_TOKENS
        numbers = [aten.number("mask of the prefix", q.itemsize) for _ in ("0", "-inf")]
        reads = (ones, *numbers)
        mask = aten.new("where.self", "mask of the prefix", ones.dims, q.itemsize, reads=reads)
        del reads, numbers
        heads = 1 if G == 1 else H
        rows: Dims = (ONE, (heads,), (A,), (D,))
        keys, values = (self.given(f"{what} of the prefix", rows, self.b) for what in ("k", "v"))
        if self.regime.several_batches or heads != H:
            return self._in_float32(q, keys, values, mask)
        return self.f.fused_attention(
            q,
            keys,
            values,
            mask,
            "attention to the prefix",
            pairs=Symbol(f"(T · {A})", lambda d: d.tokens * A),
            kernel="cpu" if self.step.device == "cpu" else "efficient",
            trains=q.node is not None,
        )

    def _in_float32(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """_scaled_dot_product_attention_math (ATen/native/transformers/attention.cpp)."""
        f, aten, b, name = self.f, self.aten, q.itemsize, "attention to the prefix"
        B_, H, T_, D = q.dims
        A = keys.dims[2]
        pairs = (*B_, *H)
        wide = f.cast(q, FLOAT32, "float32 query")
        k, v = (aten.cast(x, FLOAT32, f"float32 {x.name}") for x in (keys, values))
        scaled = f.scale(wide, "scaled query", kernel="mul.Scalar")
        turned = aten.elementwise("mul.Scalar", k.name, aten.transpose(k, -2, -1))
        right = aten.reshape(aten.expand(turned, (B_, H, D, A)), (pairs, D, A))
        scores = f.matmul(f.view(scaled, (pairs, T_, D)), right, f"{name}, scores", kernel="bmm")
        del right, turned
        scores = f.add(f.view(scores, (B_, H, T_, A)), mask, f"{name}, scores")
        scores = f.softmax(scores, f"{name}, softmax", kernel="_safe_softmax")
        returned = f.cast(scores, b, f"{name}, softmax")
        spread = aten.reshape(aten.expand(v, (B_, H, A, D)), (pairs, A, D))
        out = f.matmul(f.view(scores, (pairs, T_, A)), spread, name, kernel="bmm")
        del spread
        out = f.cast(f.view(out, q.dims), b, name)
        del returned, wide, scaled, k, v
        return out

    def _roped(self, x: Tensor, given: Shared, name: str) -> Tensor:
        """apply_rope: float32 tables make float32 of it until the end."""
        f, n = self.f, x.sizes[-1]
        x1 = f.narrow(x, n // 2)
        x2 = f.narrow(x, n - n // 2)
        halves = (f.scale(x2, f"{name}, negated", kernel="neg"), x1)
        rotated = f.cat(halves, x.dims, f"{name} turned")
        del halves
        roped = f.add(
            f.mul(x, given.cos, f"{name} · cos"),
            f.mul(rotated, given.sin, f"{name} turned · sin"),
            f"rotated {name}",
        )
        return f.cast(roped, x.itemsize, f"rotated {name}")
