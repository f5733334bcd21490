"""Forward passes of attnlab (kernels/attnlab/transformer.py) as programs, op by op.

The cache is preallocated before the pass. A module's input lives until the module returns, a
block's input until the model's loop takes its output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from planner.dtypes import element_bytes
from planner.layers import GQA, Dense, Layer, LearnedPositions, Norm, RoPE
from planner.model import Model
from planner.program import (
    FOLDED,
    SEVERAL_TOKENS,
    B,
    Buffer,
    C,
    Extent,
    Program,
    S,
    Shape,
    Symbol,
    T,
    maximum,
    visible_pairs,
)
from planner.runtimes.writer import BOOL, FLOAT32, INT64, Writer, layer_label


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Which pass: prefill into an empty cache or decode, and how."""

    kind: Literal["prefill", "decode"]
    attention: Literal["sdpa", "naive"]
    dtype: str
    kv_dtype: str
    logits: Literal["all", "last"]


@lru_cache(maxsize=128)
def forward_program(model: Model, what: Pass) -> Program:
    """One forward pass over a preallocated cache, from token ids to logits.

    `model` has grouped-query attention and dense feed-forwards only.
    """
    return _Forward(model, what).write()


class _Forward(Writer):
    """Walks through Transformer.forward and writes the tape."""

    def __init__(self, model: Model, what: Pass) -> None:
        super().__init__(model, what.dtype)
        self.what = what
        self.masks: dict[int | None, Buffer | None] = {}

    def write(self) -> Program:
        """The whole pass."""
        model, tape = self.model, self.tape
        self._cache()
        with tape.segment("embedding"):
            self._embed()
        for start, count, layer in model.layer_groups():
            label = layer_label(layer)
            if not tape.again(label, count=count, first_layer=start):
                with tape.segment(label, count=count, first_layer=start):
                    self._block(layer)
        with tape.segment("head"):
            self._head()
        return tape.program(f"attnlab {self.what.kind}")

    def _cache(self) -> None:
        element = element_bytes(self.what.kv_dtype)
        for start, count, layer in self.model.layer_groups():
            label = f"cache of {layer_label(layer)}"
            if not self.tape.again(label, count=count, first_layer=start):
                gqa = _gqa(layer)
                shape: Shape = (2, B, gqa.num_key_value_heads, C, gqa.head_dim)
                with self.tape.segment(label, count=count, first_layer=start):
                    self.tape.new("keys and values", shape, element, cache=True)

    def _embed(self) -> None:
        model, tape, b = self.model, self.tape, self.b
        shape, rows = self.hidden.shape, ((*self.hidden.shape, b),)
        self.positions = tape.new("positions", (T,), INT64), tape.new("positions", (S,), INT64)
        self.rotary: tuple[Buffer, ...] = ()
        learned = isinstance(model.positions, LearnedPositions)
        if model.embedding_scale is not None or learned:
            tokens = tape.new("input embeddings", shape, b, moved=rows)
            table = None
            if learned:
                table = tape.new("position embeddings", shape[1:], b, moved=((*shape[1:], b),))
            tape.new("hidden states", shape, b, reads=(tokens,), into=self.hidden)
            tape.free(table, tokens)
        else:
            tape.new("hidden states", shape, b, moved=rows, into=self.hidden)
        if isinstance(model.positions, RoPE):
            self._rotary_tables(model.positions.rotary_dim)
        for layer in model.layer_kinds():
            window = _gqa(layer).sliding_window
            if window not in self.masks:
                self.masks[window] = self._mask(window)

    def _rotary_tables(self, D: int) -> None:
        tape, b = self.tape, self.b
        wide = tape.new("rotary tables", (T,), FLOAT32)
        angles = tape.new("rotary tables", (T, D // 2), FLOAT32)
        tape.free(wide)
        double = tape.new("rotary tables", (T, D), FLOAT32)
        tables = []
        for _ in ("cos", "sin"):
            table = tape.new("rotary tables", (T, D), FLOAT32, reads=(double,))
            if b != FLOAT32:
                narrow = tape.new("rotary tables", (T, D), b, reads=(table,))
                table = self.replaced(narrow, table)
            tables.append(table)
        tape.free(double, angles)
        self.rotary = tuple(tables)

    def _mask(self, window: int | None) -> Buffer | None:
        """make_mask: a [T, S] bool where is_causal does not say it all."""
        if window is None:
            return None
        tape = self.tape
        masked = _if_beyond(window)
        shape: Shape = (masked, T, S)
        causal = tape.new("mask", shape, BOOL)
        lowest = tape.new("mask", (masked, T), INT64)
        near = tape.new("mask", shape, BOOL)
        tape.free(lowest)
        visible = tape.new("mask", shape, BOOL)
        tape.free(causal, near)
        return visible

    def _head(self) -> None:
        model, tape, b = self.model, self.tape, self.b
        tape.free(*self.rotary, *self.positions, *self.masks.values())
        rows: Extent = T if self.what.logits == "all" else 1
        h, V = model.hidden_size, model.vocab_size
        kept = Buffer(name="hidden states", shape=(B, rows, h), itemsize=b)
        assert model.final_norm is not None  # refused by Attnlab.attention
        last = self._norm(model.final_norm, kept, "final norm")
        tape.free(self.hidden)
        shape: Shape = (B, rows, V)
        logits = tape.new(
            "logits", shape, b, flops=(2, B, rows, h, V), reads=(last,), weight_bytes=h * V * b
        )
        tape.free(last)
        for _ in range(3 if model.final_logit_softcapping is not None else 0):
            logits = self.replaced(tape.new("logits", shape, b, reads=(logits,)), logits)

    def _norm(self, norm: Norm, x: Buffer, name: str) -> Buffer:
        tape, b, shape = self.tape, self.b, x.shape
        h = shape[-1]
        assert isinstance(h, int)
        column = (*shape[:-1], 1)
        if norm.kind == "layernorm":
            statistics = ((column, b), (column, b))
            return tape.new(name, shape, b, reads=(x,), weight_bytes=2 * h * b, scratch=statistics)
        wide = x if b == FLOAT32 else tape.new(name, shape, FLOAT32, reads=(x,))
        square = tape.new(name, shape, FLOAT32, reads=(wide,))
        mean = self.replaced(tape.new(name, column, FLOAT32, reads=(square,)), square)
        shifted = self.replaced(tape.new(name, column, FLOAT32), mean)
        inverse = self.replaced(tape.new(name, column, FLOAT32), shifted)
        scaled = tape.new(name, shape, FLOAT32, reads=(wide,))
        tape.free(inverse, *self.copy_of(wide, x))
        if norm.plus_one:
            weight = tape.new(name, (h,), FLOAT32, weight_bytes=h * b) if b != FLOAT32 else None
            factor = tape.new(name, (h,), FLOAT32)
            tape.free(weight)
            out = tape.new(name, shape, FLOAT32, reads=(scaled,))
            tape.free(factor)
            if b != FLOAT32:
                out = self.replaced(tape.new(name, shape, b, reads=(out,)), out)
            tape.free(scaled)
            return out
        narrow = scaled if b == FLOAT32 else tape.new(name, shape, b, reads=(scaled,))
        out = tape.new(name, shape, b, reads=(narrow,), weight_bytes=h * b)
        tape.free(*self.copy_of(narrow, scaled), scaled)
        return out

    def _block(self, layer: Layer) -> None:
        tape, b, shape = self.tape, self.b, self.hidden.shape
        sandwich = layer.placement == "sandwich"
        normed = self._norm(layer.norm, self.hidden, "attention norm")
        out = self._attention(_gqa(layer), normed)
        tape.free(normed)
        post = self._norm(layer.norm, out, "post norm") if sandwich else out
        middle = tape.new("residual", shape, b, reads=(self.hidden, post))
        tape.free(*{post, out})
        normed = self._norm(layer.norm, middle, "feed-forward norm")
        assert isinstance(layer.feed_forward, Dense)
        out = self._feed_forward(layer.feed_forward, normed)
        tape.free(normed)
        post = self._norm(layer.norm, out, "post norm") if sandwich else out
        tape.new("residual", shape, b, reads=(middle, post), into=self.hidden)
        tape.free(*{post, out}, middle, self.hidden)

    def _attention(self, gqa: GQA, x: Buffer) -> Buffer:
        tape, h = self.tape, self.model.hidden_size
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        shared: tuple[Buffer, ...] = ()
        if gqa.fused_qkv:
            q = k = v = self.linear("qkv_proj", x, (H + 2 * G) * D, bias=gqa.qkv_bias)
            shared = (q,)  # one storage, until the last view of it goes
        else:
            q = self.linear("q_proj", x, H * D, bias=gqa.qkv_bias)
            k = self.linear("k_proj", x, G * D, bias=gqa.qkv_bias)
            v = self.linear("v_proj", x, G * D, bias=gqa.qkv_bias)
        if isinstance(self.model.positions, RoPE):
            rotary = min(self.model.positions.rotary_dim, D)
            turned = self.rotate(q, (B, T, H), D, rotary)
            tape.free(*({q} - set(shared)))
            q = turned
            turned = self.rotate(k, (B, T, G), D, rotary)
            tape.free(*({k} - set(shared)))
            k = turned
        # append copies k and v into the cache; only q goes on
        tape.free(*({k, v, *shared} - {q}))
        out = self._attend(gqa, q)
        projected = self.linear("o_proj", out, h, bias=gqa.o_bias)
        tape.free(out)
        return projected

    def _attend(self, gqa: GQA, q: Buffer) -> Buffer:
        tape, b, kv = self.tape, self.b, element_bytes(self.what.kv_dtype)
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        read: Shape = (2, B, G, S, D, kv)
        casts: tuple[Buffer, ...] = ()
        if self.what.kv_dtype != self.what.dtype:
            casts = tuple(tape.new("cast keys, values", (B, G, S, D), b) for _ in range(2))
        flops: Shape = (4 * D, B, H, visible_pairs(gqa.sliding_window))
        mask = self.masks[gqa.sliding_window]
        if self.what.attention == "naive":
            return self._naive(gqa, q, casts, flops, read)
        additive = None
        if mask is not None:  # aten turns a bool mask into one of q's dtype
            additive = tape.new("mask", mask.shape, b, reads=(mask,))
        out = tape.new(
            "attention",
            (B, T, H * D),
            b,
            flops=flops,
            reads=(q,),
            moved=(read,),
            scratch=(((B, H, T), FLOAT32),),  # log-sum-exp
        )
        tape.free(additive, *casts, q)
        return out

    def _naive(
        self,
        gqa: GQA,
        q: Buffer,
        casts: tuple[Buffer, ...],
        flops: Shape,
        read: Shape,
    ) -> Buffer:
        """attention.naive: float32 throughout, scores [B, G, H/G·T, S] kept in full."""
        tape, b = self.tape, self.b
        H, G, D = gqa.num_attention_heads, gqa.num_key_value_heads, gqa.head_dim
        window = gqa.sliding_window
        plain = _plain_causal(window)
        causal = tape.new("mask", (plain, T, S), BOOL)
        shape_q: Shape = (B, H, T, D)
        wide = tape.new("float32 query", shape_q, FLOAT32, reads=(q,)) if b != FLOAT32 else None
        scaled = tape.new("float32 query", shape_q, FLOAT32, reads=(q,))
        tape.free(wide)
        if H != G:  # reshape to [B, G, H/G·T, D]; the transposed layout allows no view
            copy = tape.new("float32 query", (SEVERAL_TOKENS, *shape_q), FLOAT32)
            tape.free(copy)
        keys = tape.new("float32 keys", (B, G, S, D), FLOAT32) if b != FLOAT32 else None
        if H == G:
            folded = tape.new("float32 query", (FOLDED, *shape_q), FLOAT32)
        table: Shape = (B, H, T, S)
        scores = tape.new("scores", table, FLOAT32, flops=flops, reads=(scaled,), moved=(read,))
        tape.free(keys, scaled, folded if H == G else None)
        for _ in range(2 if gqa.logit_softcap is not None else 0):
            scores = self.replaced(tape.new("softcap", table, FLOAT32, reads=(scores,)), scores)
        # where there is a mask the scores exist twice for a moment
        masked: Shape = (_masked(window), *table)
        minus_infinity = (((_masked(window),), FLOAT32),)
        copy = tape.new("masked scores", masked, FLOAT32, reads=(scores,), scratch=minus_infinity)
        tape.free(copy)
        scores = self.replaced(tape.new("softmax", table, FLOAT32, reads=(scores,)), scores)
        values = tape.new("float32 values", (B, G, S, D), FLOAT32) if b != FLOAT32 else None
        out = tape.new("attention", (B, T, H * D), FLOAT32, reads=(scores,))
        tape.free(values)
        if b != FLOAT32:
            narrow = tape.new("attention", (B, T, H * D), b, reads=(out,))
            out = self.replaced(narrow, out)
        tape.free(scores, causal, *casts, q)
        copy = tape.new("attention", (SEVERAL_TOKENS, *out.shape), b, reads=(out,))  # flatten(2)
        tape.free(copy)
        return out

    def _feed_forward(self, dense: Dense, x: Buffer) -> Buffer:
        tape, b, i, h = self.tape, self.b, dense.intermediate_size, self.model.hidden_size
        wide = (*x.shape[:-1], i)
        if dense.fused_gate_up:
            both = self.linear("gate_up_proj", x, 2 * i, bias=dense.bias)
            active = tape.new("activation", wide, b, reads=(both,))
            product = tape.new("gate · up", wide, b, reads=(both, active))
            tape.free(active, both)
        elif dense.gated:
            gate = self.linear("gate_proj", x, i, bias=dense.bias)
            active = self._activate(dense.activation, gate)
            up = self.linear("up_proj", x, i, bias=dense.bias)
            product = tape.new("gate · up", wide, b, reads=(active, up))
            tape.free(active, up)
        else:
            up = self.linear("up_proj", x, i, bias=dense.bias)
            product = self._activate(dense.activation, up)
        out = self.linear("down_proj", product, h, bias=dense.bias)
        tape.free(product)
        return out

    def _activate(self, activation: str, x: Buffer) -> Buffer:
        """The activation of x, which it consumes; gelu_new op by op."""
        tape, b, shape = self.tape, self.b, x.shape
        if activation != "gelu_new":
            return self.replaced(tape.new("activation", shape, b, reads=(x,)), x)
        inner = tape.new("gelu_new", shape, b, reads=(x,))
        for _ in ("0.044715 ·", "x +", "√(2/π) ·"):
            inner = self.replaced(tape.new("gelu_new", shape, b, reads=(inner,)), inner)
        half = tape.new("gelu_new", shape, b, reads=(x,))
        tanh = tape.new("gelu_new", shape, b, reads=(inner,))
        plus = self.replaced(tape.new("gelu_new", shape, b, reads=(tanh,)), tanh)
        out = tape.new("activation", shape, b, reads=(half, plus))
        tape.free(half, plus, inner, x)
        return out


def _gqa(layer: Layer) -> GQA:
    assert isinstance(layer.attention, GQA)
    return layer.attention


def _if_beyond(window: int) -> Symbol:
    """1 where make_mask makes a tensor: the window is shorter than the context."""
    return Symbol(f"(S > {window})", lambda d: (d.context > window) * 1)


def _plain_causal(window: int | None) -> Symbol:
    """1 where naive makes the causal mask of a layer itself."""
    if window is None:
        return SEVERAL_TOKENS
    return Symbol(
        f"(T > 1) · (S <= {window})", lambda d: (d.tokens > 1) * 1 * (d.context <= window)
    )


def _masked(window: int | None) -> Symbol:
    """1 where naive has any mask to apply."""
    if window is None:
        return SEVERAL_TOKENS
    return Symbol(
        f"max(T > 1, S > {window})", lambda d: maximum((d.tokens > 1) * 1, (d.context > window) * 1)
    )
