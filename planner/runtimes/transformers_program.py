"""Forward passes of transformers 5.23 as programs: every storage its modelling code really makes.

Written beside models/<type>/modeling_<type>.py, integrations/sdpa_attention.py,
integrations/moe.py, masking_utils.py and cache_utils.py of that version, in eval mode, under
no_grad, without padding. What keeps a tensor alive are Python's references: a layer's input is held
by the model's loop until the layer returns, the input embeddings by the model's forward until it
returns, eager attention's weights by the layer that unpacks them into `_`.

Shapes.  B batch · T tokens of this pass · S context after it · P = S − T · h hidden · H query heads
         G kv heads · D head dim · E experts · k experts per token · b bytes of the model dtype
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from planner.dtypes import element_bytes
from planner.layers import GQA, MLA, Dense, Layer, LearnedPositions, MoE, Norm, RoPE
from planner.model import Model
from planner.program import (
    FOLDED,
    PAST,
    SEVERAL_BATCHES,
    SEVERAL_TOKENS,
    B,
    Buffer,
    Extent,
    Program,
    S,
    Shape,
    Symbol,
    T,
    minimum,
    visible_pairs,
)
from planner.runtimes.quantised_cache import QuantisedCache
from planner.runtimes.quantised_program import QuantisedLayer
from planner.runtimes.writer import BOOL, FLOAT32, INT64, Writer, layer_label

COPIED_VIEW = Symbol("(B · T > 1)", lambda d: (d.batch * d.tokens > 1) * 1)
"""1 where a slice of a wider [B, T, …] tensor, seen as [B, H, T, D], is not contiguous."""


def kept_tokens(window: int | None, tokens: Symbol) -> Extent:
    """Tokens that a cache layer keeps of `tokens`: W − 1 of a sliding layer (all when W is 1).

    cache_utils.DynamicSlidingWindowLayer.update: keys[:, :, -W + 1 :, :].
    """
    if window is None or window == 1:
        return tokens
    kept = window - 1
    return Symbol(f"min({tokens.name}, {kept})", lambda d: minimum(tokens.of(d), kept))


def seen_tokens(window: int | None) -> Symbol:
    """Keys that one layer's attention gets: what was kept of the past, and this pass's own."""
    if window is None or window == 1:
        return S
    kept = kept_tokens(window, PAST)
    assert isinstance(kept, Symbol)
    return Symbol(f"({kept.name} + T)", lambda d: kept.of(d) + d.tokens)


def _if_masked(window: int) -> Symbol:
    """1 where sdpa needs a mask because keys reach beyond the window, else 0.

    masking_utils._ignore_causal_mask_sdpa: kv_length ≥ local_attention_size.
    """
    seen = seen_tokens(window)
    return Symbol(f"({seen.name} >= {window})", lambda d: (seen.of(d) >= window) * 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Which pass is written: prefill into an empty cache, or one decode step over a filled one.

    `held_whole`: sliding layers still hold the storage of the whole prefill (the first step).
    `equal_widths_only`: no fused kernel takes keys and values of different widths (the CPU).
    `quantised`: a QuantizedCache, None for a DynamicCache; `residual_tokens` of it are unquantised
    before the pass.
    """

    kind: Literal["prefill", "decode"]
    attention: Literal["sdpa", "eager"]
    dtype: str
    kv_dtype: str
    logits: Literal["all", "last"]
    held_whole: bool = False
    equal_widths_only: bool = False
    quantised: QuantisedCache | None = None
    residual_tokens: int = 0


@lru_cache(maxsize=128)
def forward_program(model: Model, what: Pass) -> Program:
    """One forward pass with a DynamicCache, from token ids to logits."""
    return _Forward(model, what).write()


class _Forward(Writer):
    """Walks through a model's forward and writes the tape."""

    def __init__(self, model: Model, what: Pass) -> None:
        super().__init__(model, what.dtype)
        self.what = what
        self.masks: dict[int | None, Buffer] = {}
        self.held: list[Buffer] = []  # by the model's forward until it returns
        self.old_cache: dict[Layer, tuple[Buffer, Buffer]] = {}
        self.new_cache: dict[Layer, tuple[Buffer, Buffer]] = {}
        self.quantised: dict[Layer, QuantisedLayer] = {}
        for layer in model.layer_kinds():
            if what.quantised is None:
                self.old_cache[layer] = self._cache(layer, old=True)
                self.new_cache[layer] = self._cache(layer, old=False)
            else:
                assert isinstance(layer.attention, GQA | MLA), "refused by check_quantisable"
                self.quantised[layer] = QuantisedLayer(
                    self.tape,
                    what.quantised,
                    layer.attention,
                    itemsize=self.b,
                    residual_tokens=what.residual_tokens,
                    on_cpu=what.equal_widths_only,
                )

    # -- the model's forward -------------------------------------------------------------------

    def write(self) -> Program:
        """The whole pass."""
        model, tape = self.model, self.tape
        self._open_cache()
        with tape.segment("embedding"):
            first_input = self._embed()
        for start, count, layer in model.layer_groups():
            label = str(start) if start == 0 else layer_label(layer)
            if start == 0:  # its input is not a layer's output
                with tape.segment(label, first_layer=0):
                    self._layer(layer, first_input)
                start, count, label = 1, count - 1, layer_label(layer)
            if count and not tape.again(label, count=count, first_layer=start):
                with tape.segment(label, count=count, first_layer=start):
                    self._layer(layer, self.hidden)
        with tape.segment("head"):
            last = self.hidden
            if model.final_norm is not None:
                last = self.replaced(self._norm(model.final_norm, last, "final norm"), last)
            if model.embedding_size is not None:
                last = self.replaced(self.linear("project_out", last, model.embedding_size), last)
            tape.free(*self.held, *self.masks.values())
            if model.lm_head:
                self._logits(last)
        return tape.program(f"transformers {self.what.kind}")

    def _cache(self, layer: Layer, *, old: bool) -> tuple[Buffer, Buffer]:
        """Storages of one layer's cache before and after this pass; a view holds its storage."""
        window, element = _window(layer), element_bytes(self.what.kv_dtype)
        tokens: Extent = seen_tokens(window)
        if old:
            # right after prefill: all of it; later: the last step's cat, one token more than kept
            whole = self.what.held_whole or window in (None, 1)
            tokens = PAST if whole else kept_tokens((window or 0) + 1, PAST)
        k: Shape
        v: Shape
        match layer.attention:
            case GQA(num_key_value_heads=G, head_dim=D, cache_heads=cached):
                k = v = (B, cached or G, tokens, D)
            case MLA(kv_lora_rank=d_c, qk_rope_head_dim=d_rope):
                k, v = (B, tokens, d_c), (B, tokens, d_rope)
            case _:
                raise AssertionError("refused by check_planned")
        return (
            Buffer(name="cached keys", shape=k, itemsize=element, cache=True),
            Buffer(name="cached values", shape=v, itemsize=element, cache=True),
        )

    def _open_cache(self) -> None:
        """What the cache holds before the pass: old keys and values, an int64 a sliding layer."""
        for start, count, layer in self.model.layer_groups():
            label = f"cache of {layer_label(layer)}"
            if not self.tape.again(label, count=count, first_layer=start):
                with self.tape.segment(label, count=count, first_layer=start):
                    if _window(layer) is not None:
                        self.tape.new("window size", (1,), INT64)
                    if self.what.kind == "prefill":
                        continue
                    if layer in self.quantised:
                        self.quantised[layer].open()
                    for old in self.old_cache.get(layer, ()):
                        self.tape.new(old.name, old.shape, old.itemsize, into=old)

    def _logits(self, last: Buffer) -> None:
        model, tape, b = self.model, self.tape, self.b
        rows: Extent = T if self.what.logits == "all" else 1
        h, V = model.embedding_size or model.hidden_size, model.vocab_size
        shape: Shape = (B, rows, V)
        logits = tape.new(
            "logits", shape, b, flops=(2, B, rows, h, V), reads=(last,), weight_bytes=h * V * b
        )
        for _ in range(3 if model.final_logit_softcapping is not None else 0):
            capped = tape.new("logits", shape, b, reads=(logits,))
            tape.free(logits)
            logits = capped
        tape.free(last)

    # -- embedding, masks, positions -----------------------------------------------------------

    def _embed(self) -> Buffer:
        """The first layer's input. The rotary family holds it to the end; GPT-2 a sum's parts."""
        model, tape, b = self.model, self.tape, self.b
        shape = (B, T, model.hidden_size)
        wide = (B, T, model.embedding_size or model.hidden_size)
        embeddings = tape.new("input embeddings", wide, b, moved=((*wide, b),))
        if model.embedding_size is not None:
            projected = self.linear("project_in", embeddings, model.hidden_size)
            embeddings = self.replaced(projected, embeddings)
        if model.embedding_scale is not None:
            scaled = tape.new("input embeddings", shape, b, reads=(embeddings,))
            tape.free(embeddings)
            embeddings = scaled
        index = tape.new("positions", (T,), INT64)
        self.held = [tape.new("positions", (T,), INT64), embeddings]
        tape.free(index)
        first_input = embeddings
        if isinstance(model.positions, LearnedPositions):
            table = tape.new("position embeddings", (1, *shape[1:]), b, moved=((*shape[1:], b),))
            self.held.append(table)
            tape.new("residual", shape, b, reads=(embeddings, table), into=self.hidden)
            first_input = self.hidden
        self._masks()
        if isinstance(model.positions, RoPE):
            self._rotary_tables(model.positions)
        return first_input

    def _masks(self) -> None:
        """A mask for each kind of layer, where the backend needs one (masking_utils.py)."""
        tape, b, eager = self.tape, self.b, self.what.attention == "eager"
        windows = set(self.model.mask_windows or map(_window, self.model.layer_kinds()))
        for window in sorted(windows, key=lambda w: (w is not None, w or 0)):
            shape: Shape = (T, seen_tokens(window))
            if not eager:
                if window is None:
                    continue  # is_causal, or one query that sees everything
                shape = (_if_masked(window), *shape)
            pieces = [tape.new("mask", shape, BOOL) for _ in range(1 if window is None else 2)]
            visible = tape.new("mask", shape, BOOL) if len(pieces) > 1 else pieces.pop()
            tape.free(*pieces)
            if eager:
                self.masks[window] = tape.new("mask", (B, *shape), b, reads=(visible,))
                tape.free(visible)
            else:
                self.masks[window] = visible

    def _rotary_tables(self, rope: RoPE) -> None:
        tape, b, D = self.tape, self.b, rope.rotary_dim
        position = tape.new("rotary tables", (T,), FLOAT32)
        angles = tape.new("rotary tables", (T, D // 2), FLOAT32, reads=(position,))
        tape.free(position)
        double = tape.new("rotary tables", (T, D), FLOAT32, reads=(angles,))
        tables = []
        for _ in ("cos", "sin"):
            plain = tape.new("rotary tables", (T, D), FLOAT32, reads=(double,))
            tables.append(tape.new("rotary tables", (T, D), FLOAT32, reads=(plain,)))
            tape.free(plain)
        if b != FLOAT32:
            wide = tables
            tables = [tape.new("rotary tables", (T, D), b, reads=(table,)) for table in wide]
            tape.free(*wide)
        tape.free(double, angles)
        self.held += tables

    # -- one block -----------------------------------------------------------------------------

    def _layer(self, layer: Layer, x: Buffer) -> None:
        """`x` lives in the model's loop until the block has returned."""
        tape, b, shape = self.tape, self.b, self.hidden.shape
        if layer.placement not in ("pre", "sandwich"):
            return self._other_layer(layer, x)
        sandwich = layer.placement == "sandwich"
        normed = self._norm(layer.norm, x, "attention norm")
        attended, weights = self._attention(layer, normed)
        if self.model.text_type == "gpt2":
            # GPT2Block keeps attn_output, and the norm's output until the sum replaces it
            middle = tape.new("residual", shape, b, reads=(x, attended))
            tape.free(normed)
            late: tuple[Buffer | None, ...] = (attended, weights)
        else:
            tape.free(normed)
            if sandwich:
                attended = self.replaced(self._norm(layer.norm, attended, "post norm"), attended)
            middle = tape.new("residual", shape, b, reads=(x, attended))
            tape.free(attended)
            late = (weights,)
        normed = self._norm(layer.norm, middle, "feed-forward norm")
        fed = self._feed_forward(layer.feed_forward, normed)
        if sandwich:
            tape.free(normed)
            fed = self.replaced(self._norm(layer.norm, fed, "post norm"), fed)
            normed = fed
        tape.new("residual", shape, b, reads=(middle, fed), into=self.hidden)
        tape.free(*({normed, fed}), middle, *late)
        if x not in self.held:
            tape.free(x)

    def _other_layer(self, layer: Layer, x: Buffer) -> None:
        """Norms after each part, or both parts side by side. Approximate: not compared yet."""
        tape, b, shape = self.tape, self.b, self.hidden.shape
        if layer.placement == "post":
            out, weights = self._attention(layer, x)
            out = self.replaced(self._norm(layer.norm, out, "post norm"), out)
            middle = self.replaced(tape.new("residual", shape, b, reads=(x, out)), out)
            fed = self._feed_forward(layer.feed_forward, middle)
            fed = self.replaced(self._norm(layer.norm, fed, "post norm"), fed)
            tape.new("residual", shape, b, reads=(middle, fed), into=self.hidden)
            tape.free(fed, middle, weights)
        elif layer.placement == "post-sum":
            out, weights = self._attention(layer, x)
            total = self.replaced(tape.new("residual", shape, b, reads=(x, out)), out)
            middle = self.replaced(self._norm(layer.norm, total, "post norm"), total)
            fed = self._feed_forward(layer.feed_forward, middle)
            total = tape.new("residual", shape, b, reads=(middle, fed))
            tape.free(fed, middle)
            tape.new("post norm", shape, b, reads=(total,), into=self.hidden)
            tape.free(total, weights)
        else:
            normed = self._norm(layer.norm, x, "attention norm")
            out, weights = self._attention(layer, normed)
            second = normed
            if layer.placement == "parallel-two":
                second = self.replaced(self._norm(layer.norm, x, "feed-forward norm"), normed)
            fed = self._feed_forward(layer.feed_forward, second)
            both = tape.new("residual", shape, b, reads=(out, fed))
            tape.new("residual", shape, b, reads=(both, x), into=self.hidden)
            tape.free(both, second, fed, out, weights)
        if x not in self.held:
            tape.free(x)

    def _attention(self, layer: Layer, x: Buffer) -> tuple[Buffer, Buffer | None]:
        match layer.attention:
            case GQA():
                return self._gqa(layer, layer.attention, x)
            case MLA():
                return self._mla(layer, layer.attention, x)
            case _:
                raise AssertionError("refused by check_planned")

    def _norm(self, norm: Norm, x: Buffer, name: str) -> Buffer:
        """LayerNorm is one op; RMSNorm python: float32 copy, square, mean, scale, cast, weight."""
        tape, b, shape = self.tape, self.b, x.shape
        h = shape[-1]
        assert isinstance(h, int)
        column = (*shape[:-1], 1)
        if norm.kind == "layernorm":
            statistics = ((column, b), (column, b))
            return tape.new(name, shape, b, reads=(x,), weight_bytes=2 * h * b, scratch=statistics)
        wide = x if b == FLOAT32 else tape.new(name, shape, FLOAT32, reads=(x,))
        square = tape.new(name, shape, FLOAT32, reads=(wide,))
        mean = tape.new(name, column, FLOAT32, reads=(square,))
        tape.free(square)
        shifted = tape.new(name, column, FLOAT32)
        if norm.plus_one:
            tape.free(mean)
        inverse = tape.new(name, column, FLOAT32)
        tape.free(shifted)
        scaled = tape.new(name, shape, FLOAT32, reads=(wide,))
        tape.free(inverse, *self.copy_of(wide, x))
        if norm.plus_one:  # Gemma2RMSNorm multiplies by (1 + weight) in float32, then casts
            weight = tape.new(name, (h,), FLOAT32, weight_bytes=h * b) if b != FLOAT32 else None
            factor = tape.new(name, (h,), FLOAT32)
            tape.free(weight)
            out = tape.new(name, shape, FLOAT32, reads=(scaled,))
            tape.free(factor, scaled)
            if b == FLOAT32:
                return out
            return self.replaced(tape.new(name, shape, b, reads=(out,)), out)
        narrow = scaled if b == FLOAT32 else tape.new(name, shape, b, reads=(scaled,))
        out = tape.new(name, shape, b, reads=(narrow,), weight_bytes=h * b)
        tape.free(*self.copy_of(narrow, scaled), scaled, mean)
        return out

    # -- attention -----------------------------------------------------------------------------

    def _gqa(self, layer: Layer, attention: GQA, x: Buffer) -> tuple[Buffer, Buffer | None]:
        """(output of o_proj, eager's attention weights)."""
        tape = self.tape
        H, G = attention.num_attention_heads, attention.num_key_value_heads
        D, bias = attention.head_dim, attention.qkv_bias
        if attention.fused_qkv:  # q, k and v are views of one storage, held until the return
            fused = self.linear("qkv_proj", x, (H + 2 * G) * D, bias=bias)
            q = k = v = fused
            held = [fused]
        else:
            q = self.linear("q_proj", x, H * D, bias=bias)
            k = self.linear("k_proj", x, G * D, bias=bias)
            v = self.linear("v_proj", x, G * D, bias=bias)
            held = []
        if attention.qk_norm is not None and not attention.fused_qkv:
            normed_q = self._norm(attention.qk_norm.norm, q, "query norm")
            normed_k = self._norm(attention.qk_norm.norm, k, "key norm")
            tape.free(q, k)
            q, k = normed_q, normed_k
        fresh = [b for b in (k, v) if b not in held]
        turned = COPIED_VIEW if held else SEVERAL_TOKENS if G > 1 else 0
        copies: tuple[Extent, Extent] = (turned, turned)
        if isinstance(self.model.positions, RoPE):
            rotary = min(self.model.positions.rotary_dim, D)
            copies = (SEVERAL_TOKENS if G > 1 and rotary == D else 0, turned)
            turned_q = self.rotate(q, (B, H, T), D, rotary)
            turned_k = self.rotate(k, (B, G, T), D, rotary)
            tape.free(*(b for b in (q, k) if b not in held))
            q, k = turned_q, turned_k
            fresh = [b for b in (k, v) if b not in held]
        keys, values = self._append(layer, k, v, copies)
        tape.free(*(b for b in fresh if b not in (keys, values)))
        held += [b for b in dict.fromkeys((q, keys, values)) if not b.cache and b not in held]
        out, weights = self._attend(
            q, keys, values, heads=(H, G), widths=(D, D), attention=attention
        )
        projected = self.linear("o_proj", out, self.model.hidden_size, bias=attention.o_bias)
        tape.free(out, *held)
        return projected, weights

    def _rotate_interleaved(self, x: Buffer, rows: Shape, D: int) -> Buffer:
        """Even and odd slices rotated apart, then joined (apply_rotary_pos_emb_interleave)."""
        tape, b, half = self.tape, self.b, (*rows, D // 2)
        parts = []
        for _ in ("even", "odd"):
            products = [tape.new("rotary", half, b, reads=(x,)) for _ in range(2)]
            parts.append(tape.new("rotary", half, b, reads=tuple(products)))
            tape.free(*products)
        out = tape.new("rotated", (*rows, D), b, reads=tuple(parts))
        tape.free(*parts)
        return out

    def _append(
        self, layer: Layer, k: Buffer, v: Buffer, copies: tuple[Extent, Extent]
    ) -> tuple[Buffer, Buffer]:
        """DynamicCache.update: torch.cat of old and new. A sliding layer drops the old late.

        A quantised one gives attention tensors that are no part of it. `copies`: 1 where the new
        keys and values are not contiguous.
        """
        if layer in self.quantised:
            if self.what.kind == "prefill":
                return self.quantised[layer].prefill(k, v, copies=copies)
            return self.quantised[layer].decode(k, v)
        tape, old = self.tape, self.old_cache[layer]
        new_k, new_v = self.new_cache[layer]
        filled = self.what.kind == "decode"
        late = _window(layer) not in (None, 1)
        before_k, before_v = ((old[0],), (old[1],)) if filled else ((), ())
        tape.new(new_k.name, new_k.shape, new_k.itemsize, reads=(*before_k, k), into=new_k)
        if not late:
            tape.free(*before_k)
        tape.new(new_v.name, new_v.shape, new_v.itemsize, reads=(*before_v, v), into=new_v)
        tape.free(*(before_k if late else ()), *before_v)
        return new_k, new_v

    def _attend(
        self,
        q: Buffer,
        keys: Buffer,
        values: Buffer,
        *,
        heads: tuple[int, int],
        widths: tuple[int, int],
        attention: GQA | MLA,
    ) -> tuple[Buffer, Buffer | None]:
        """([B, T, H·D_v], the weights that eager returns). FLOPs are those under the mask."""
        (H, _), (D, D_v) = heads, widths
        window = attention.sliding_window if isinstance(attention, GQA) else None
        flops: Shape = (2 * (D + D_v), B, H, visible_pairs(window))
        if self.what.attention == "sdpa":
            return self._sdpa(q, keys, values, heads, widths, window, flops), None
        softcap = isinstance(attention, GQA) and attention.logit_softcap is not None
        sliced = isinstance(attention, MLA)
        return self._eager(
            q, keys, values, heads, widths, window, flops, softcap=softcap, sliced_values=sliced
        )

    def _sdpa(
        self,
        q: Buffer,
        keys: Buffer,
        values: Buffer,
        heads: tuple[int, int],
        widths: tuple[int, int],
        window: int | None,
        flops: Shape,
    ) -> Buffer:
        """A fused kernel. With a mask, k and v are repeated unless one query is packed instead."""
        tape, b, (H, G), (D, D_v) = self.tape, self.b, heads, widths
        if D_v != D and self.what.equal_widths_only:
            return self._sdpa_math(q, keys, values, H, widths, flops)
        mask = self.masks.get(window)
        extra: list[Buffer] = []
        if mask is not None:
            assert window is not None
            if 1 < G < H and self.what.kind == "prefill":  # one head repeated is a view
                masked, seen = _if_masked(window), seen_tokens(window)
                extra += [
                    tape.new("repeated keys, values", (masked, B, H, seen, d), b, reads=(t,))
                    for t, d in zip((keys, values), widths, strict=True)
                ]
            extra.append(tape.new("mask", (B, *mask.shape), b, reads=(mask,)))
        out = tape.new(
            "attention",
            (B, T, H * D_v),
            b,
            flops=flops,
            reads=(q, keys, values),
            scratch=(((B, H, T), FLOAT32),),  # log-sum-exp
        )
        tape.free(*extra)
        return out

    def _sdpa_math(
        self,
        q: Buffer,
        keys: Buffer,
        values: Buffer,
        H: int,
        widths: tuple[int, int],
        flops: Shape,
    ) -> Buffer:
        """aten._scaled_dot_product_attention_math without repeated heads: all of it in float32."""
        tape, b, (D, D_v) = self.tape, self.b, widths
        prefill = self.what.kind == "prefill"
        table: Shape = (B, H, T, S)
        held: list[Buffer] = []
        if b != FLOAT32:
            held += [
                tape.new("float32 copies", (B, H, rows, d), FLOAT32, reads=(t,))
                for t, rows, d in ((q, T, D), (keys, S, D), (values, S, D_v))
            ]
        held.append(tape.new("scaled query", (B, H, T, D), FLOAT32))
        if prefill:
            ones = tape.new("mask", (T, S), BOOL)
            lower = self.replaced(tape.new("mask", (T, S), BOOL), ones)
            held.append(tape.new("mask", (T, S), FLOAT32))
            tape.free(lower)
        scaled = tape.new("scaled keys", (B, H, S, D), FLOAT32)
        scores = tape.new("scores", table, FLOAT32, flops=flops, reads=(q, keys))
        tape.free(scaled)
        if prefill:
            masked = tape.new("masked scores", table, FLOAT32, reads=(scores,))
            scores = self.replaced(masked, scores)
        weights = tape.new("attention weights", table, FLOAT32, reads=(scores,))
        held.append(self.replaced(weights, scores))
        if b != FLOAT32:
            held.append(tape.new("attention weights", table, b, reads=(weights,)))
        copied: Shape = (SEVERAL_BATCHES, B, H, S, D_v)
        copy = tape.new("values copy", copied, FLOAT32, reads=(values,))
        out = tape.new("attention", (B, T, H * D_v), FLOAT32, reads=(weights, copy))
        tape.free(copy)
        if b != FLOAT32:
            out = self.replaced(tape.new("attention", (B, T, H * D_v), b, reads=(out,)), out)
        tape.free(*held)
        self._turn(out)
        return out

    def _turn(self, out: Buffer) -> None:
        """out.transpose(1, 2).contiguous(): for a moment two of them, unless T is 1."""
        copy = self.tape.new("attention", (SEVERAL_TOKENS, *out.shape), self.b, reads=(out,))
        self.tape.free(copy)

    def _eager(
        self,
        q: Buffer,
        keys: Buffer,
        values: Buffer,
        heads: tuple[int, int],
        widths: tuple[int, int],
        window: int | None,
        flops: Shape,
        *,
        softcap: bool,
        sliced_values: bool,
    ) -> tuple[Buffer, Buffer]:
        """eager_attention_forward: every step a [B, H, T, keys] tensor, the softmax in float32."""
        tape, b, (H, G), (D, D_v) = self.tape, self.b, heads, widths
        seen = seen_tokens(window)
        repeated: tuple[Buffer, ...] = ()
        if 1 < G < H:
            repeated = tuple(
                tape.new("repeated keys, values", (B, H, seen, d), b, reads=(t,))
                for t, d in zip((keys, values), widths, strict=True)
            )
        # matmul folds [B, H] into one dimension: q's transposed layout has to be copied for it
        # and so does one kv head that is expanded to all
        copies = [tape.new("query copy", (FOLDED, B, H, T, D), b, reads=(q,))]
        one_head = 1 == G < H
        # a quantised prefill attends to keys and values as projected, in the layout of q
        as_projected = G == H and not keys.cache and self.what.kind == "prefill"
        if one_head:
            copies.append(tape.new("keys copy", (SEVERAL_BATCHES, B, H, seen, D), b))
        if as_projected and not sliced_values:
            copies.append(tape.new("keys copy", (FOLDED, B, H, seen, D), b, reads=(keys,)))
        shape: Shape = (B, H, T, seen)
        scores = tape.new("scores", shape, b, flops=flops, reads=(q, keys))
        tape.free(*copies)
        for name in ("scores", *("softcap",) * (3 if softcap else 0), "masked scores"):
            scores = self.replaced(tape.new(name, shape, b, reads=(scores,)), scores)
        upcast = b != FLOAT32 and self.model.text_type != "gpt2"  # its softmax stays in b
        wide = tape.new("softmax", shape, FLOAT32, reads=(scores,)) if upcast else scores
        size = FLOAT32 if upcast else b
        weights = tape.new("attention weights", shape, size, reads=(wide,))
        tape.free(*self.copy_of(wide, scores))
        if upcast:
            narrow = tape.new("attention weights", shape, b, reads=(weights,))
            weights = self.replaced(narrow, weights)
        tape.free(scores)
        # and values that are a transposed slice of a wider tensor (MLA) as well
        shape_v: Shape = (SEVERAL_BATCHES, B, H, seen, D_v)
        copied = sliced_values or one_head
        if as_projected and not sliced_values:
            shape_v, copied = (FOLDED, *shape_v[1:]), True
        sliced = tape.new("values copy", shape_v, b, reads=(values,)) if copied else None
        out = tape.new("attention", (B, T, H * D_v), b, reads=(weights, values))
        tape.free(sliced)
        self._turn(out)
        tape.free(*repeated)
        return out, weights

    def _mla(self, layer: Layer, attention: MLA, x: Buffer) -> tuple[Buffer, Buffer | None]:
        """Latents are cached, then expanded to full keys and values for every pass (expand_kv)."""
        tape, b = self.tape, self.b
        H, D, D_v = attention.num_attention_heads, attention.qk_head_dim, attention.v_head_dim
        d_c, D_rope, bias = attention.kv_lora_rank, attention.qk_rope_head_dim, attention.bias
        latent_norm = Norm(kind="rmsnorm", eps=1e-6)
        if attention.q_lora_rank is None:
            q = self.linear("q_proj", x, H * D)
        else:
            down = self.linear("q_a_proj", x, attention.q_lora_rank, bias=bias)
            normed = self._norm(latent_norm, down, "q_a_layernorm")
            tape.free(down)
            q = self.linear("q_b_proj", normed, H * D)
            tape.free(normed)
        compressed = self.linear("kv_a_proj_with_mqa", x, d_c + D_rope, bias=bias)
        latent_view = Buffer(name="latent", shape=(B, T, d_c), itemsize=b)
        latent = self._norm(latent_norm, latent_view, "kv_a_layernorm")
        rows_q, rows_k = (B, H, T), (B, 1, T)
        if attention.rope_interleave:
            turned_q = self._rotate_interleaved(q, rows_q, D_rope)
            turned_k = self._rotate_interleaved(compressed, rows_k, D_rope)
        else:
            turned_q = self.rotate(q, rows_q, D_rope, D_rope)
            turned_k = self.rotate(compressed, rows_k, D_rope, D_rope)
        latents, rotary_keys = self._append(layer, latent, turned_k, (0, 0))
        tape.free(*(b for b in (latent, turned_k) if b not in (latents, rotary_keys)))
        held = [b for b in (latents, rotary_keys) if not b.cache]
        query = tape.new("query", (B, H, T, D), b, reads=(q, turned_q))
        into = attention.qk_nope_head_dim + D_v
        expanded = tape.new(
            "kv_b_proj",
            (B, S, H, into),
            b,
            flops=(2, B, S, d_c, H, into),
            reads=(latents,),
            weight_bytes=b * d_c * H * into,
        )
        keys = tape.new("expanded keys", (B, H, S, D), b, reads=(expanded,))
        out, weights = self._attend(
            query, keys, expanded, heads=(H, H), widths=(D, D_v), attention=attention
        )
        projected = self.linear("o_proj", out, self.model.hidden_size, bias=bias)
        tape.free(out, query, turned_q, compressed, q, keys, expanded, *held)
        return projected, weights

    # -- feed-forward --------------------------------------------------------------------------

    def _feed_forward(self, feed_forward: Dense | MoE | None, x: Buffer) -> Buffer:
        match feed_forward:
            case Dense():
                return self._dense(feed_forward, x)
            case MoE():
                return self._mixture(feed_forward, x)
            case _:
                raise AssertionError("refused by check_planned")

    def _dense(self, dense: Dense, x: Buffer) -> Buffer:
        tape, b, i, h = self.tape, self.b, dense.intermediate_size, self.model.hidden_size
        wide = (*x.shape[:-1], i)
        if dense.fused_gate_up:  # gate and up are views of one storage until the return
            both = self.linear("gate_up_proj", x, 2 * i, bias=dense.bias)
            active = self._activate(dense.activation, both, wide)
            product = tape.new("gate · up", wide, b, reads=(both, active))
            tape.free(active)
            out = self.linear("down_proj", product, h, bias=dense.bias)
            tape.free(product, both)
            return out
        if dense.gated:
            gate = self.linear("gate_proj", x, i, bias=dense.bias)
            active = self._activate(dense.activation, gate, wide)
            tape.free(gate)
            up = self.linear("up_proj", x, i, bias=dense.bias)
            product = tape.new("gate · up", wide, b, reads=(active, up))
            tape.free(active, up)
        else:
            up = self.linear("up_proj", x, i, bias=dense.bias)
            product = self._activate(dense.activation, up, wide)
            tape.free(up)
        out = self.linear("down_proj", product, h, bias=dense.bias)
        tape.free(product)
        return out

    def _activate(self, activation: str, x: Buffer, shape: Shape) -> Buffer:
        """The activation of x or of a slice of it. gelu_new is python (activations.NewGELU)."""
        tape, b = self.tape, self.b
        if activation != "gelu_new":
            return tape.new("activation", shape, b, reads=(x,))
        half = tape.new("gelu_new", shape, b, reads=(x,))
        step = tape.new("gelu_new", shape, b, reads=(x,))
        for _ in ("0.044715 x³", "+ x", "√(2/π)", "tanh", "1 +"):
            step = self.replaced(tape.new("gelu_new", shape, b, reads=(step,)), step)
        out = tape.new("activation", shape, b, reads=(half, step))
        tape.free(step, half)
        return out

    def _mixture(self, moe: MoE, x: Buffer) -> Buffer:
        """grouped_mm_experts_forward: tokens sorted by expert, two grouped GEMMs.

        Expert weights are read once each, as far as the tokens reach them: min(E, tokens · k).
        """
        tape, b, h = self.tape, self.b, self.model.hidden_size
        k, i = moe.num_experts_per_tok, moe.moe_intermediate_size
        scores, indices, router = self._route(moe, x)
        flat: Shape = (B, T, k)
        order = [tape.new("routing", flat, INT64) for _ in range(2)]
        tokens = tape.new("routing", flat, INT64)
        picked = tape.new("routed tokens", (*flat, h), b, reads=(x,))
        tape.free(tokens)
        order += [tape.new("routing", flat, FLOAT32) for _ in range(2)]
        order += [tape.new("routing", (moe.num_experts,), FLOAT32) for _ in range(2)]
        reached = Symbol(
            f"min({moe.num_experts}, {k} · B · T)",
            lambda d: minimum(moe.num_experts, k * d.batch * d.tokens),
        )
        both = tape.new(
            "experts gate_up",
            (*flat, 2 * i),
            b,
            flops=(2, *flat, h, 2 * i),
            reads=(picked,),
            moved=((reached, 2 * i * h * b),),
        )
        active = self._activate(moe.activation, both, (*flat, i))
        product = tape.new("experts gate · up", (*flat, i), b, reads=(both, active))
        tape.free(active, both)
        down = tape.new(
            "experts down",
            (*flat, h),
            b,
            flops=(2, *flat, i, h),
            reads=(product,),
            moved=((reached, i * h * b),),
        )
        tape.free(product)
        weighted = tape.new("weighted experts", (*flat, h), FLOAT32, reads=(down,))
        order.append(tape.new("routing", flat, INT64))
        unsorted = tape.new("weighted experts", (*flat, h), FLOAT32, reads=(weighted,))
        tape.free(weighted)
        out = tape.new("experts output", (B, T, h), FLOAT32, reads=(unsorted,))
        if b != FLOAT32:
            out = self.replaced(tape.new("experts output", (B, T, h), b, reads=(out,)), out)
        tape.free(*order, unsorted, down, picked)
        if moe.shared is not None:
            shared = self._dense(moe.shared, x)
            total = tape.new("experts output", (B, T, h), b, reads=(out, shared))
            tape.free(out, shared)
            out = total
        tape.free(scores, indices, *router)
        return out

    def _route(self, moe: MoE, x: Buffer) -> tuple[Buffer, Buffer, tuple[Buffer, ...]]:
        """(weights, expert indices, what the block holds of the router until it returns)."""
        tape, b, h = self.tape, self.b, self.model.hidden_size
        E, k = moe.num_experts, moe.num_experts_per_tok
        table: Shape = (B, T, E)
        if moe.router != "sigmoid-groups":
            logits = self.linear("router", x, E)
            wide = logits if b == FLOAT32 else tape.new("router", table, FLOAT32, reads=(logits,))
            chances = tape.new("router", table, FLOAT32, reads=(wide,))
            tape.free(*self.copy_of(wide, logits))
        else:
            casts: tuple[Buffer, ...] = ()
            if b != FLOAT32:
                tokens = tape.new("router", (B, T, h), FLOAT32, reads=(x,))
                casts = (tokens, tape.new("router", (E, h), FLOAT32, weight_bytes=E * h * b))
            logits = tape.new("router", table, FLOAT32, flops=(2, B, T, h, E), reads=casts or (x,))
            tape.free(*casts)
            chances = tape.new("router", table, FLOAT32, reads=(logits,))
            choice = [tape.new("router", table, FLOAT32, reads=(chances,)) for _ in range(2)]
            tape.free(*choice)
        scores = tape.new("routing", (B, T, k), FLOAT32, reads=(chances,))
        indices = tape.new("routing", (B, T, k), INT64)
        tape.free(chances)
        return scores, indices, (logits,)


def _window(layer: Layer) -> int | None:
    return layer.attention.sliding_window if isinstance(layer.attention, GQA) else None
