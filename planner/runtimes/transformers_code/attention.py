"""Attention: the projections of each type, positions, the cache, scores; latent attention."""

from __future__ import annotations

from collections.abc import Sequence

from planner.autograd.aten import ONE
from planner.autograd.tensors import Dims, Tensor
from planner.layers import GQA, MLA, Layer, Norm
from planner.mixers.mamba import Mamba2
from planner.program import B, T
from planner.runtimes.transformers_code.mamba2 import Mamba2Writer
from planner.runtimes.transformers_code.regime import Shared

LATENT_NORM = Norm(kind="rmsnorm", eps=1e-6)


class AttentionWriter(Mamba2Writer):
    """Attention of one decoder layer: (what it adds, the weights that eager attention returns)."""

    def attention(self, layer: Layer, x: Tensor, given: Shared) -> tuple[Tensor, Tensor | None]:
        """<Type>Attention.forward."""
        match layer.attention:
            case GQA() as gqa:
                return self._grouped(layer, gqa, x, given)
            case MLA() as mla:
                return self._latent(layer, mla, x, given)
            case Mamba2() as mixer:
                return self.mamba2(mixer, x), None
            case _:
                raise AssertionError("refused by check_planned")

    def _grouped(
        self, layer: Layer, gqa: GQA, x: Tensor, given: Shared
    ) -> tuple[Tensor, Tensor | None]:
        f = self.f
        q, k, v, whole = self._projected(gqa, x)
        parts: Sequence[Tensor] = ()
        if given.rotation is not None and gqa.rope:
            if self.code.rotary == "held":
                turned = self.rotated(q, k, given.rotation)
                parts = (k, turned[1], q, turned[0])  # a tuple lets go of its last one first
                q, k = self.joined(q, k, turned)
                del turned
            else:
                q, k = self.rotated(q, k, given.rotation)
        k, v = self.update(layer, k, v)
        out, weights = self.attend(gqa, q, k, v, given)
        H, D = gqa.num_attention_heads, gqa.head_dim
        out = f.view(out, ((B,), (T,), (H * D,)))
        out = self.linear(out, "o_proj", self.model.hidden_size, bias=gqa.o_bias)
        if parts:
            del q, k, v
        del parts, whole
        return out, weights

    # -- queries [B, H, T, D], keys and values [B, G, T, D] ---------------------------------------

    def _projected(self, gqa: GQA, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Queries, keys, values, and the product they are views of, if there is a name for it."""
        H, G = gqa.num_attention_heads, gqa.num_key_value_heads
        if gqa.fused_qkv and (self.code.projections == "chunked" or gqa.interleaved_qkv):
            return self._head_by_head(gqa, x)
        if gqa.fused_qkv:
            return self._of_one(gqa, x)
        if self.code.projections == "first":
            return *self._first_all_three(gqa, x), None
        if self.code.block == "cohere":
            return *self._normed_when_all_are_there(gqa, x), None
        q = self.f.transpose(self._by_heads(gqa, x, "q", H), 1, 2)
        k = self.f.transpose(self._by_heads(gqa, x, "k", G), 1, 2)
        v = self.f.transpose(self._by_heads(gqa, x, "v", G), 1, 2)
        if self.code.late_norms and gqa.qk_norm is not None:
            q = self.norm(gqa.qk_norm.norm, q, "q norm", "q_norm")
            k = self.norm(gqa.qk_norm.norm, k, "k norm", "k_norm")
        return q, k, v, None

    def _normed_when_all_are_there(self, gqa: GQA, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """CohereAttention.forward: norms of [B, T, heads, D]."""
        f, H, G = self.f, gqa.num_attention_heads, gqa.num_key_value_heads
        q, k, v = (
            self._by_heads(gqa, x, letter, n) for letter, n in zip("qkv", (H, G, G), strict=True)
        )
        if gqa.qk_norm is not None:
            q = self.norm(gqa.qk_norm.norm, q, "q norm", "q_norm", *q.sizes[2:])
            k = self.norm(gqa.qk_norm.norm, k, "k norm", "k_norm", *k.sizes[2:])
        q, k, v = f.transpose(q, 1, 2), f.transpose(k, 1, 2), f.transpose(v, 1, 2)
        return q, k, v

    def _heads(self, x: Tensor, heads: int) -> Tensor:
        """[B, T, heads · D] as [B, heads, T, D]."""
        width = x.sizes[-1] // heads
        return self.f.transpose(self.f.view(x, ((B,), (T,), (heads,), (width,))), 1, 2)

    def _of_one(self, gqa: GQA, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One matrix: all queries, then all keys, then all values."""
        f, H, G, D = self.f, gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        qkv = self.linear(x, "qkv_proj", (H + 2 * G) * D, bias=gqa.qkv_bias)
        widths = (H * D, G * D, G * D)
        if self.code.projections == "split":
            q, k, v = f.split(qkv, widths)
        else:
            q, k, v = (f.narrow(qkv, width) for width in widths)
        return self._heads(q, H), self._heads(k, G), self._heads(v, G), qkv

    def _head_by_head(self, gqa: GQA, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One matrix whose rows go head by head: q, k and v of each (gpt_neox)."""
        H, D = gqa.num_attention_heads, gqa.head_dim
        qkv = self._heads(self.linear(x, "qkv_proj", 3 * H * D, bias=gqa.qkv_bias), H)
        q, k, v = self.f.split(qkv, (D, D, D))
        return q, k, v, qkv

    def _first_all_three(self, gqa: GQA, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The three products one after the other, then their heads."""
        f, H, G = self.f, gqa.num_attention_heads, gqa.num_key_value_heads
        if self.code.scaled_queries:  # opt: heads of the queries first
            q = f.scale(self._flat(gqa, x, "q", H), "scaled queries")
            q = self._heads(q, H)
            k, v = self._flat(gqa, x, "k", G), self._flat(gqa, x, "v", G)
            return q, self._heads(k, G), self._heads(v, G)
        q, k, v = (
            self._flat(gqa, x, letter, n) for letter, n in zip("qkv", (H, G, G), strict=True)
        )
        if gqa.clip_qkv is not None:
            q, k, v = (f.clamp_(part, f"clipped {part.name}") for part in (q, k, v))
        q, k, v = self._heads(q, H), self._heads(k, G), self._heads(v, G)
        if gqa.qk_norm is not None and gqa.qk_norm.width == "head-list":
            q = self._norm_by_head(gqa, q, "q")
            k = self._norm_by_head(gqa, k, "k")
        return q, k, v

    def _norm_by_head(self, gqa: GQA, x: Tensor, letter: str) -> Tensor:
        """StableLmLayerNormPerHead.forward: [B, heads, T, D] head by head, joined again."""
        assert gqa.qk_norm is not None
        f, norm, name = self.f, gqa.qk_norm.norm, f"{letter}_norm"
        heads = x.sizes[1]
        parts = [
            self.norm(norm, part, f"{letter} norm", f"{name}.{index}")
            for index, part in enumerate(f.split(x, (1,) * heads, 1))
        ]
        return f.cat(parts, x.dims, name, dim=1)

    def _flat(self, gqa: GQA, x: Tensor, letter: str, heads: int) -> Tensor:
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
        norm, flat = gqa.qk_norm, self._flat(gqa, x, letter, heads)
        by_head = norm is not None and norm.width in ("head", "per-head")
        if norm is None or not by_head or letter == "v" or self.code.late_norms:
            return self.f.view(flat, shape)
        sizes = (heads, gqa.head_dim) if norm.width == "per-head" else (gqa.head_dim,)
        out = self.f.view(flat, shape)
        del flat
        return self.norm(norm.norm, out, f"{letter} norm", f"{letter}_norm", *sizes)

    # -- latent attention -------------------------------------------------------------------------

    def _latent(
        self, layer: Layer, mla: MLA, x: Tensor, given: Shared
    ) -> tuple[Tensor, Tensor | None]:
        """DeepseekV3Attention.forward: latents are cached, then expanded to keys and values."""
        f, H, D_rope = self.f, mla.num_attention_heads, mla.qk_rope_head_dim
        d_c, D_nope, D_v, bias = mla.kv_lora_rank, mla.qk_nope_head_dim, mla.v_head_dim, mla.bias
        D = mla.qk_head_dim
        if mla.q_lora_rank is None:
            q = self.linear(x, "q_proj", H * D, bias=False)
        else:
            q = self._low_rank_queries(mla, x)
        q = self._heads(q, H)
        q_pass, q_rot = f.split(q, (D_nope, D_rope))
        compressed = self.linear(x, "kv_a_proj_with_mqa", d_c + D_rope, bias=bias)
        latent, k_rot = f.split(compressed, (d_c, D_rope))
        latent = self.norm(LATENT_NORM, latent, "kv_a_layernorm", "kv_a_layernorm")
        latent = f.view(latent, ((B,), ONE, (T,), (d_c,)))
        k_rot = f.view(k_rot, ((B,), ONE, (T,), (D_rope,)))
        if given.rotation is not None:
            if mla.rope_interleave and self.code.rotary != "complex":
                cos, sin = given.rotation
                turned = (
                    self._interleaved(q_rot, cos, "query"),
                    self._interleaved(k_rot, sin, "key"),
                )
            else:
                turned = self.rotated(q_rot, k_rot, given.rotation)
            q_rot, k_rot = turned
            del turned
        latent, k_rot = self.update(layer, latent, k_rot)
        query = f.cat((q_pass, q_rot), q.dims, "query")
        keys, values = self._expanded(mla, latent, k_rot)
        out, weights = self.attend(mla, query, keys, values, given)
        out = f.view(out, ((B,), (T,), (H * D_v,)))
        out = self.linear(out, "o_proj", self.model.hidden_size, bias=bias)
        return out, weights

    def _low_rank_queries(self, mla: MLA, x: Tensor) -> Tensor:
        down = self.linear(x, "q_a_proj", mla.q_lora_rank or 0, bias=mla.bias)
        normed = self.norm(LATENT_NORM, down, "q_a_layernorm", "q_a_layernorm")
        del down
        return self.linear(
            normed, "q_b_proj", mla.num_attention_heads * mla.qk_head_dim, bias=False
        )

    def _expanded(self, mla: MLA, latent: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        """expand_kv: keys in a tensor of their own, values a slice of what was expanded."""
        f, H = self.f, mla.num_attention_heads
        D_nope, D_v, tokens = mla.qk_nope_head_dim, mla.v_head_dim, latent.dims[2]
        flat = self.linear(latent, "kv_b_proj", H * (D_nope + D_v), bias=False)
        whole = f.transpose(f.view(flat, ((B,), tokens, (H,), (D_nope + D_v,))), 1, 2)
        del flat
        _, values = f.split(whole, (D_nope, D_v))
        dims: Dims = ((B,), (H,), tokens, (D_nope + k_rot.sizes[-1],))
        keys = self.aten.new("new_empty", "expanded keys", dims, self.b, reads=(whole, k_rot))
        return keys, values

    def _interleaved(self, x: Tensor, table: Tensor, name: str) -> Tensor:
        """apply_rotary_pos_emb_interleave: even and odd slices rotated apart, then joined."""
        f, half = self.f, x.sizes[-1] // 2
        even, odd = f.every_second(x), f.every_second(x)
        part = f.narrow(table, half)
        parts = tuple(
            f.sub(f.mul(a, part, name), f.mul(b, part, name), f"rotated {name}")
            for a, b in ((even, odd), (odd, even))
        )
        return f.cat(parts, x.dims, f"rotated {name}")
