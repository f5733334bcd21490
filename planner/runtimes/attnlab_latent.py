"""Latent attention (MLA) of one block of attnlab, op by op: latent.py there.

Expanded, the latents of all keys are multiplied out; absorbed, H · T queries share one kv head.
"""

from __future__ import annotations

from typing import Literal

from planner.layers import MLA, Norm, RoPE
from planner.program import (
    FOLDED,
    SEVERAL_BATCHES,
    SEVERAL_TOKENS,
    B,
    Buffer,
    Extent,
    Shape,
    T,
    visible_pairs,
)
from planner.runtimes.attnlab_attention import SEVERAL_KEYS, AttentionWriter
from planner.runtimes.writer import BOOL, FLOAT32

Latent = Literal["expanded", "absorbed"]
NORM = Norm(kind="rmsnorm", eps=1e-6)


class LatentWriter(AttentionWriter):
    """Writes latent attention; `latent`: which way."""

    latent: Latent

    def latent_block(self, mla: MLA, x: Buffer) -> Buffer:
        """LatentAttention.forward."""
        tape = self.tape
        whole, q_r = self._queries(mla, x)
        attended = self.cache.append(mla, (self._latents(mla, x),))
        write = self._absorbed if self.latent == "absorbed" else self._expanded
        out, straight = write(mla, attended.keys)
        tape.free(*attended.held, whole, q_r)
        if not straight and mla.num_attention_heads > 1:  # flatten(2) of [B, H, T, v]
            copy = tape.new("attention", (SEVERAL_TOKENS, *out.shape), self.b, reads=(out,))
            tape.free(copy)
        shape: Shape = (B, T, mla.num_attention_heads * mla.v_head_dim)
        flat = Buffer(name="attention", shape=shape, itemsize=self.b)
        projected = self.linear("o_proj", flat, self.model.hidden_size, bias=mla.bias)
        tape.free(out)
        return projected

    def _queries(self, mla: MLA, x: Buffer) -> tuple[Buffer, Buffer | None]:
        """What both parts of a query are views of, and the rotated part."""
        H, r = mla.num_attention_heads, mla.qk_rope_head_dim
        if mla.q_lora_rank is None:
            whole = self.linear("q_proj", x, H * mla.qk_head_dim)
        else:
            down = self.linear("q_a_proj", x, mla.q_lora_rank, bias=mla.bias)
            normed = self.replaced(self.norm(NORM, down, "query norm"), down)
            whole = self.replaced(self.linear("q_b_proj", normed, H * mla.qk_head_dim), normed)
        return whole, self._turned(mla, Buffer(name="q", shape=(B, T, H, r), itemsize=self.b))

    def _latents(self, mla: MLA, x: Buffer) -> Buffer:
        """What is cached of new tokens: the normed latent, the rotated key behind it."""
        tape, b, c, r = self.tape, self.b, mla.kv_lora_rank, mla.qk_rope_head_dim
        both = self.linear("kv_a_proj", x, c + r, bias=mla.bias)
        k_r = self._turned(mla, Buffer(name="k", shape=(B, T, 1, r), itemsize=b))
        normed = self.norm(NORM, Buffer(name="latent", shape=(B, T, c), itemsize=b), "latent norm")
        latents = tape.new("latents", (B, T, c + r), b, reads=(normed, k_r or both), kernel="cat")
        tape.free(normed, both, k_r)
        return latents

    def _turned(self, mla: MLA, x: Buffer) -> Buffer | None:
        """Rotated, neighbours taken apart before where the tables are in halves; None: a view."""
        positions, r = self.model.positions, mla.qk_rope_head_dim
        if not isinstance(positions, RoPE) or not r:
            return None
        apart = None
        if mla.rope_interleave and not positions.interleaved:
            apart = self.tape.new("pairs apart", x.shape, self.b, reads=(x,), kernel="cat")
        turned = self.rotate(apart or x, x.shape[:-1], r, min(positions.rotary_dim, r))
        self.tape.free(apart)
        return turned

    def _expanded(self, mla: MLA, keys: Extent) -> tuple[Buffer, bool]:
        """Every head's keys and values rebuilt; whether the output lies token by token."""
        tape, b, H, c = self.tape, self.b, mla.num_attention_heads, mla.kv_lora_rank
        D, D_v = mla.qk_head_dim, mla.v_head_dim
        read = Buffer(name="latents", shape=(B, keys, c), itemsize=b)
        heads = self.linear("kv_b_proj", read, H * (mla.qk_nope_head_dim + D_v))
        k = self._two_parts("keys", (B, H, keys), mla.qk_nope_head_dim, D)
        q = self._two_parts("queries", (B, H, T), mla.qk_nope_head_dim, D)
        flops: Shape = (2 * (D + D_v), B, H, visible_pairs(None))
        values: Shape = (2, B, H, keys, D_v, b)
        mask = self.masks[self.cache.pattern(mla)].table
        if self.attention == "naive":
            causal = self._causal(mla, keys)
            out = self._plain(q, k, D_v, flops=flops, moved=values)
            tape.free(causal)
        else:
            out = self._fused(q, k, mask, D_v, flops=flops, moved=values)
        tape.free(q, k, heads)
        return out, self.attention != "naive"

    def _two_parts(self, name: str, rows: Shape, first: int, width: int) -> Buffer:
        """Two parts of each row joined, neither of which lies whole."""
        moved = ((*rows, first, self.b), (*rows, width - first, self.b))
        return self.tape.new(name, (*rows, width), self.b, moved=moved, kernel="cat", loop="joined")

    def _absorbed(self, mla: MLA, keys: Extent) -> tuple[Buffer, bool]:
        """Queries in the latents' space, over the latents as they lie."""
        tape, b, H, c = self.tape, self.b, mla.num_attention_heads, mla.kv_lora_rank
        n, r, D_v = mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim
        several = H > 1
        straight = weights = None
        if several:
            shape: Shape = (FOLDED, B, H, T, n)
            straight = self._copied("queries", shape, shape, loop="strided")
            weights = self._matrices((H, n, c), loop="strided")
        within = tape.new(
            "queries of latents",
            (B, H, T, c),
            b,
            flops=(2, B, H, T, n, c),
            moved=((B, H, T, n, b), (B, H, n, c, b)),
            kernel="bmm",
        )
        tape.free(weights, straight)
        q = tape.new("queries", (B, H, T, c + r), b, reads=(within,), kernel="cat")
        tape.free(within)
        table = self.masks[self.cache.pattern(mla)].table
        causal = self._causal(mla, keys)
        shown = self.cache.pattern(mla).several_or_tabled
        mask = tape.new("mask", (shown, H, T, keys), BOOL, kernel="cat")
        tape.free(causal)
        flops: Shape = (2 * (2 * c + r), B, H, visible_pairs(None))
        kv = Buffer(name="latents", shape=(B, 1, keys, c + r), itemsize=b)
        if self.attention == "naive":
            made = self._plain(q, kv, c, flops=flops, moved=(B, keys, c, b), shared=True)
        else:
            made = self._fused(q, kv, mask if table else None, c, flops=flops, moved=(0,))
        tape.free(mask)
        weights = self._matrices((H, c, D_v), loop="across") if several else None
        out = tape.new(
            "attention",
            (B, T, H * D_v),
            b,
            flops=(2, B, H, T, c, D_v),
            reads=(made,),
            moved=((B, H, c, D_v, b),),
            kernel="bmm",
        )
        tape.free(weights, made, q)
        return out, False

    def _causal(self, mla: MLA, keys: Extent) -> Buffer:
        """The table that naive and an absorbed mask need where a kernel would be told "causal"."""
        pattern = self.cache.pattern(mla)
        return self.tape.new("mask", (pattern.plain_causal, T, keys), BOOL)

    def _matrices(self, shape: Shape, *, loop: str) -> Buffer:
        """Matrices of all heads for each sequence, where there are several; `loop`: as they lie,
        or transposed."""
        read = (SEVERAL_BATCHES, *shape)
        return self._copied("matrices", (SEVERAL_BATCHES, B, *shape), read, loop=loop)

    def _copied(self, name: str, shape: Shape, read: Shape, *, loop: str) -> Buffer:
        """What matmul folds a batch into."""
        return self.tape.new(
            name, shape, self.b, moved=((*read, self.b),), kernel="clone", loop=loop
        )

    def _fused(
        self, q: Buffer, k: Buffer, mask: Buffer | None, D_v: int, *, flops: Shape, moved: Shape
    ) -> Buffer:
        """implementations.sdpa, by a kernel that keeps the scores on chip."""
        tape, b = self.tape, self.b
        additive = None
        if mask is not None:  # aten turns a bool mask into one of q's dtype
            additive = tape.new("mask", mask.shape, b, reads=(mask,))
        rows = q.shape[:-1]
        out = tape.new(
            "attention",
            (*rows, D_v),
            b,
            flops=flops,
            reads=(q, k),
            moved=(moved,),
            scratch=((rows, FLOAT32),),  # log-sum-exp
        )
        tape.free(additive)
        return out

    def _plain(
        self, q: Buffer, k: Buffer, D_v: int, *, flops: Shape, moved: Shape, shared: bool = False
    ) -> Buffer:
        """implementations.naive: float32 throughout; `shared`: one kv head for all queries."""
        tape, b = self.tape, self.b
        heads, keys = k.shape[1], k.shape[2]
        wide = tape.new("float32 query", q.shape, FLOAT32, reads=(q,)) if b != FLOAT32 else None
        scaled = tape.new("float32 query", q.shape, FLOAT32, reads=(q,))
        tape.free(wide)
        wide = tape.new("float32 keys", k.shape, FLOAT32, reads=(k,)) if b != FLOAT32 else None
        table: Shape = (*q.shape[:-1], keys)
        scores = tape.new("scores", table, FLOAT32, flops=flops, reads=(scaled, wide or k))
        tape.free(wide, scaled)
        copy = tape.new(
            "masked scores",
            (SEVERAL_TOKENS, *table),
            FLOAT32,
            reads=(scores,),
            scratch=(((SEVERAL_TOKENS,), FLOAT32),),  # −inf
        )
        tape.free(copy)
        scores = self.replaced(tape.new("softmax", table, FLOAT32, reads=(scores,)), scores)
        kv: Shape = (B, heads, keys, D_v)
        v = tape.new("float32 values", kv, FLOAT32, moved=(moved,)) if b != FLOAT32 else None
        straight = None
        if not shared and heads != 1:  # values lie token by token
            copied = (SEVERAL_BATCHES, SEVERAL_KEYS, *kv)
            straight = tape.new("float32 values", copied, FLOAT32)
        out = tape.new("attention", (*q.shape[:-1], D_v), FLOAT32, reads=(scores,))
        tape.free(straight, v)
        if b != FLOAT32:
            out = self.replaced(tape.new("attention", out.shape, b, reads=(out,)), out)
        tape.free(scores)
        return out
