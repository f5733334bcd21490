"""Attention of one block of attnlab, op by op: attention.py and implementations.py there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from planner.layers import GQA, MLA, ALiBi, Norm, RoPE
from planner.model import Model
from planner.program import (
    FOLDED,
    SEVERAL_BATCHES,
    SEVERAL_TOKENS,
    B,
    Buffer,
    Extent,
    Shape,
    Symbol,
    T,
    Tape,
    visible_pairs,
)
from planner.runtimes.attnlab_cache_program import Attended, CacheProgram
from planner.runtimes.attnlab_masks import Pattern
from planner.runtimes.writer import BOOL, FLOAT32, INT64, Writer

SEVERAL_KEYS = Symbol("(S > 1)", lambda d: (d.context > 1) * 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskBuffers:
    """The mask of a pattern: a bool table, or ALiBi's bias [1, H, T, S]."""

    table: Buffer | None = None
    bias: Buffer | None = None


class AttentionWriter(Writer):
    """Writes masks and attention; `norm` writes one norm."""

    attention: str
    cache: CacheProgram
    norm: Callable[[Norm, Buffer, str], Buffer]

    def __init__(self, model: Model, dtype: str) -> None:
        super().__init__(model, dtype)
        self.masks: dict[Pattern, MaskBuffers] = {}

    def make_masks(self) -> None:
        """One for each pattern of layers."""
        for layer in self.model.layer_kinds():
            attention = layer.attention
            assert isinstance(attention, GQA | MLA)
            pattern = self.cache.pattern(attention)
            if pattern in self.masks:
                continue
            if isinstance(self.model.positions, ALiBi):
                assert isinstance(attention, GQA), "no other attention takes a bias"
                self.masks[pattern] = self._bias(attention, pattern)
            else:
                self.masks[pattern] = self._mask(pattern)

    def _table(self, pattern: Pattern, made: Symbol) -> Buffer:
        """visibility(): [T, keys], each condition a table of its own for a moment."""
        tape = self.tape
        shape: Shape = (made, T, pattern.keys)
        visible = tape.new("mask", shape, BOOL)
        if pattern.window is not None:
            lowest = tape.new("mask", (made, T), INT64)
            if pattern.chunked:  # query − query % window
                lowest = self.replaced(tape.new("mask", (made, T), INT64), lowest)
            near = tape.new("mask", shape, BOOL)
            tape.free(lowest)
            both = tape.new("mask", shape, BOOL)
            tape.free(visible, near)
            visible = both
        if pattern.ring:
            filled = tape.new("mask", (pattern.joined, pattern.keys), BOOL)
            both = tape.new("mask", (pattern.joined, T, pattern.keys), BOOL)
            tape.free(filled, both)  # of the same size as what it replaces
        return visible

    def _mask(self, pattern: Pattern) -> MaskBuffers:
        return MaskBuffers(table=self._table(pattern, pattern.tabled))

    def _bias(self, gqa: GQA, pattern: Pattern) -> MaskBuffers:
        """ALiBi: distances, then slopes times them, then −inf where nothing is seen."""
        tape, H = self.tape, gqa.num_attention_heads
        item = FLOAT32 if self.attention == "naive" else self.b
        slopes = tape.new("slopes", (H,), item)
        slopes = self.replaced(tape.new("slopes", (H,), item), slopes)
        shown = pattern.several_or_tabled
        visible = self._table(pattern, shown)
        distance = tape.new("bias", (T, pattern.keys), INT64)
        cast = tape.new("bias", (T, pattern.keys), item)
        bias = tape.new("bias", (H, T, pattern.keys), item)
        tape.free(distance, cast)
        masked = tape.new("bias", (shown, H, T, pattern.keys), item, scratch=(((shown,), item),))
        tape.free(masked, visible, slopes)
        return MaskBuffers(bias=bias)

    def free_masks(self) -> None:
        """`del masks`."""
        self.tape.free(*(buffer for m in self.masks.values() for buffer in (m.table, m.bias)))

    def attention_block(self, gqa: GQA, x: Buffer) -> Buffer:
        """Projections, norms, rotation, cache, attention, output projection."""
        tape, h = self.tape, self.model.hidden_size
        q, k, v = self._project(gqa, x)
        shared = {q, k, v} if q is k else set()
        if isinstance(self.model.positions, RoPE) and gqa.rope:
            q, k = self._rotate(gqa, q, k, shared)
        if gqa.qk_norm is not None and gqa.qk_norm.after_rope:
            q, k, v = self._qk_norms(gqa, [q, k, v])
        attended = self.cache.append(gqa, (k, v), (q,))
        out = self._attend(gqa, q, attended)
        projected = self.linear("o_proj", out, h, bias=gqa.o_bias)
        tape.free(out)
        return projected

    def _rotate(self, gqa: GQA, q: Buffer, k: Buffer, shared: set[Buffer]) -> tuple[Buffer, Buffer]:
        """Each turned in a new storage; one that q, k and v share goes with the last of them."""
        assert isinstance(self.model.positions, RoPE)
        D = gqa.head_dim
        rotary = min(self.model.positions.rotary_dim, D)
        turned = []
        for x, heads in ((q, gqa.num_attention_heads), (k, gqa.num_key_value_heads)):
            turned.append(self.rotate(x, (B, T, heads), D, rotary))
            self.tape.free(*({x} - shared))
        return turned[0], turned[1]

    def _project(self, gqa: GQA, x: Buffer) -> tuple[Buffer, Buffer, Buffer]:
        tape, b = self.tape, self.b
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        widths = (H * D, G * D, G * D)
        if gqa.fused_qkv:
            whole = self.linear("qkv_proj", x, (H + 2 * G) * D, bias=gqa.qkv_bias)
            if not gqa.interleaved_qkv or G == 1:  # views
                parts = [whole] * 3
            else:
                parts = [
                    tape.new(f"{letter} of qkv", (B, T, width), b, reads=(whole,))
                    for letter, width in zip("qkv", widths, strict=True)
                ]
                tape.free(whole)
        else:
            parts = [
                self.linear(
                    f"{letter}_proj", x, width, bias=gqa.qkv_bias and letter not in gqa.unbiased
                )
                for letter, width in zip("qkv", widths, strict=True)
            ]
        norm = None if gqa.qk_norm is None or gqa.qk_norm.after_rope else gqa.qk_norm
        if norm is not None and norm.width == "full":
            parts = self._qk_norms(gqa, parts)
        if gqa.clip_qkv is not None:
            clipped = [
                tape.new("clipped", (B, T, width), b, reads=(part,))
                for part, width in zip(parts, widths, strict=True)
            ]
            tape.free(*dict.fromkeys(parts))
            parts = clipped
        if norm is not None and norm.width != "full":
            parts = self._qk_norms(gqa, parts)
        return parts[0], parts[1], parts[2]

    def _qk_norms(self, gqa: GQA, parts: list[Buffer]) -> list[Buffer]:
        """Both normed before either projection goes."""
        assert gqa.qk_norm is not None
        D, norm, width = gqa.head_dim, gqa.qk_norm.norm, gqa.qk_norm.width
        normed = []
        for heads, name in ((gqa.num_attention_heads, "q"), (gqa.num_key_value_heads, "k")):
            shape: Shape = (B, T, heads * D) if width == "full" else (B, T, heads, D)
            x = Buffer(name=name, shape=shape, itemsize=self.b)
            if width in ("head", "full"):
                normed.append(self.norm(norm, x, f"{name} norm"))
            elif width == "per-head":
                normed.append(self._headwise(norm, x, f"{name} norm"))
            else:
                normed.append(self._norm_of_each_head(norm, x, heads, f"{name} norm"))
        self.tape.free(*dict.fromkeys(p for p in parts[:2] if p is not parts[2]))
        return [*normed, parts[2]]

    def _headwise(self, norm: Norm, x: Buffer, name: str) -> Buffer:
        """HeadwiseNorm.forward: float32 throughout."""
        tape, b, shape = self.tape, self.b, x.shape
        column = (*shape[:-1], 1)
        wide = x if b == FLOAT32 else tape.new(name, shape, FLOAT32, reads=(x,))
        if norm.kind == "layernorm":
            mean = tape.new(name, column, FLOAT32, reads=(wide,))
            centred = tape.new(name, shape, FLOAT32, reads=(wide,))
            tape.free(mean, *self.copy_of(wide, x))
            wide = centred
        square = tape.new(name, shape, FLOAT32, reads=(wide,))
        averaged = tape.new(name, column, FLOAT32, reads=(square,), kernel="mean")
        mean = self.replaced(averaged, square)
        shifted = self.replaced(tape.new(name, column, FLOAT32, reads=(mean,)), mean)
        inverse = self.replaced(tape.new(name, column, FLOAT32, reads=(shifted,)), shifted)
        scaled = tape.new(name, shape, FLOAT32, reads=(wide,))
        tape.free(inverse, *self.copy_of(wide, x))
        weight = tape.new(name, shape[-2:], FLOAT32) if b != FLOAT32 else None
        out = tape.new(name, shape, FLOAT32, reads=(scaled,))
        tape.free(weight)
        if b != FLOAT32:
            out = self.replaced(tape.new(name, shape, b, reads=(out,)), out)
        tape.free(scaled)
        return out

    def _norm_of_each_head(self, norm: Norm, x: Buffer, heads: int, name: str) -> Buffer:
        """NormOfEachHead.forward: a norm for each head, then one tensor of them."""
        D = x.shape[-1]
        each = [
            self.norm(norm, Buffer(name=name, shape=(B, T, D), itemsize=self.b), name)
            for _ in range(heads)
        ]
        out = self.tape.new(name, x.shape, self.b)
        self.tape.free(*each)
        return out

    def _attend(self, gqa: GQA, q: Buffer, attended: Attended) -> Buffer:
        tape, b = self.tape, self.b
        G, D, H = gqa.num_key_value_heads, gqa.head_dim, gqa.num_attention_heads
        read: Shape = (2, B, G, attended.keys, D, self.cache.kv_b)
        pattern = self.cache.pattern(gqa)
        flops: Shape = (4 * D, B, H, visible_pairs(pattern.window))
        mask = self.masks[pattern]
        if self.attention == "naive":
            return self._naive(gqa, q, attended)
        additive: Buffer | None = None
        given: tuple[Shape, ...] = ()
        if mask.table is not None:  # aten turns a bool mask into one of q's dtype
            shape = mask.table.shape
            additive = tape.new("mask", shape, b, reads=(mask.table,), loop="strided")
            given = ((*shape, b),)
        elif mask.bias is not None:
            given = ((1, T, attended.keys, H * b),)
        out = tape.new(
            "attention",
            (B, T, H * D),
            b,
            flops=flops,
            reads=(q,),
            moved=(read, *given),
            scratch=(((B, H, T), FLOAT32),),  # log-sum-exp
        )
        tape.free(additive, *attended.held, q)
        return out

    def _naive(self, gqa: GQA, q: Buffer, attended: Attended) -> Buffer:
        """implementations.naive: float32 throughout, scores [B, G, H/G·T, keys] kept in full.

        All keys and all values are cast in every layer, out of slots that are filled in part, and
        every pair is computed, seen or not.
        """
        tape, b = self.tape, self.b
        H, G, D, keys = (
            gqa.num_attention_heads,
            gqa.num_key_value_heads,
            gqa.head_dim,
            attended.keys,
        )
        pattern = self.cache.pattern(gqa)
        mask = self.masks[pattern]
        causal = None
        if mask.bias is None:
            square: Shape = (pattern.plain_causal, T, keys)
            causal = tape.new("mask", square, BOOL, moved=((*square, BOOL),), loop="strided")
        shape_q: Shape = (B, H, T, D)
        wide = tape.new("float32 query", shape_q, FLOAT32, reads=(q,)) if b != FLOAT32 else None
        scaled = tape.new("float32 query", shape_q, FLOAT32, reads=(q,))
        tape.free(wide)
        folded = None
        if H != G:  # reshape to [B, G, H/G·T, D]; the transposed layout allows no view
            tape.free(_copied(tape, "float32 query", (SEVERAL_TOKENS, *shape_q)))
        kv: Shape = (B, G, keys, D)
        k = self._wide("float32 keys", kv, attended)
        if H == G > 1:  # one head folds as it lies
            folded = _copied(tape, "float32 query", (FOLDED, *shape_q))
        # keys and values that lie token by token cannot be folded to [B·G, keys, D] in place
        copied: tuple[Symbol, ...] = ()
        if attended.strided is not None and G > 1:
            copied = (attended.strided, SEVERAL_BATCHES, SEVERAL_KEYS)
        straight = _copied(tape, "float32 keys", (*copied, *kv)) if copied else None
        table: Shape = (B, H, T, keys)
        rows: Shape = (B, G, H // G, T)  # as many matrices as key-value heads
        product: Shape = (2, *rows, keys, D)
        scores = tape.new(
            "scores",
            (*rows, keys),
            FLOAT32,
            flops=product,
            moved=((*rows, D, FLOAT32), (*kv, FLOAT32)),
            kernel="bmm",
        )
        tape.free(straight, k, scaled, folded)
        for _ in range(2 if gqa.logit_softcap is not None else 0):
            scores = self.replaced(tape.new("softcap", table, FLOAT32, reads=(scores,)), scores)
        if mask.bias is not None:
            scores = self.replaced(tape.new("biased scores", table, FLOAT32), scores)
        else:  # where there is a mask the scores exist twice for a moment
            shown = pattern.several_or_tabled
            copy = tape.new(
                "masked scores",
                (shown, *table),
                FLOAT32,
                moved=((shown, *table, FLOAT32),),
                loop="strided",
                scratch=(((shown,), FLOAT32),),  # −inf
            )
            tape.free(copy)
        beside = None
        if gqa.sinks:  # one column more; what is cut out of it again is a view
            beside = tape.new("sinks", (H,), FLOAT32) if b != FLOAT32 else None
            table = (B, H, T, _one_more(keys))
            scores = self.replaced(tape.new("scores and sinks", table, FLOAT32), scores)
        scores = self.replaced(tape.new("softmax", table, FLOAT32, reads=(scores,)), scores)
        v = self._wide("float32 values", kv, attended)
        straight = _copied(tape, "float32 values", (*copied, *kv)) if copied else None
        out = tape.new(
            "attention",
            (B, T, H * D),
            FLOAT32,
            flops=product,
            moved=((*rows, keys, FLOAT32), (*kv, FLOAT32)),
            kernel="bmm",
        )
        tape.free(straight, v)
        if b != FLOAT32:
            narrow = tape.new("attention", (B, T, H * D), b, reads=(out,))
            out = self.replaced(narrow, out)
        tape.free(scores, beside, causal, *attended.held, q)
        if H > 1:  # flatten(2)
            again = (SEVERAL_TOKENS, *out.shape, b)
            shape = (SEVERAL_TOKENS, *out.shape)
            tape.free(tape.new("attention", shape, b, moved=(again,), loop="strided"))
        return out

    def _wide(self, name: str, kv: Shape, attended: Attended) -> Buffer | None:
        """All keys, or all values, in float32."""
        if self.b == FLOAT32:
            return None
        loop = "cast" if attended.held and attended.strided is None else "strided cast"
        return self.tape.new(name, kv, FLOAT32, moved=((*kv, self.b),), loop=loop)


def _copied(tape: Tape, name: str, shape: Shape) -> Buffer:
    """A float32 tensor laid out anew."""
    return tape.new(name, shape, FLOAT32, moved=((*shape, FLOAT32),), loop="strided")


def _one_more(keys: Extent) -> Extent:
    if isinstance(keys, int):
        return keys + 1
    return Symbol(f"({keys.name} + 1)", lambda d: keys.of(d) + 1)
