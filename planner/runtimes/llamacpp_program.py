"""llama.cpp's graph of a dense decoder, as a program: activations are float32, masks a tensor.

From llama-graph.cpp (build_attn_mha, build_ffn) and src/models/llama.cpp. Norm, scale, softmax and
residual sum write over their input where ggml's allocator lets them.
"""

from __future__ import annotations

from planner.dtypes import element_bytes
from planner.kv_format_names import KV_FORMATS
from planner.kv_formats import attention_bytes
from planner.layers import GQA, Dense, Layer
from planner.model import Model
from planner.program import B, Buffer, Extent, Program, S, Shape, T, visible_pairs
from planner.runtimes.writer import FLOAT32, Writer, layer_label


def graph_program(
    model: Model, *, dtype: str, kv_dtype: str, flash: bool, logits_of_all: bool
) -> Program:
    """One graph over T tokens of B sequences and S cells; the cache lies outside of it."""
    return _Graph(model, dtype, kv_dtype, flash=flash, logits_of_all=logits_of_all).write()


class _Graph(Writer):
    """Weights in the model's dtype, everything computed in float32."""

    def __init__(
        self, model: Model, dtype: str, kv_dtype: str, *, flash: bool, logits_of_all: bool
    ) -> None:
        super().__init__(model, "fp32")
        self.weight_b, self.kv_dtype = element_bytes(dtype), kv_dtype
        self.flash, self.logits_of_all = flash, logits_of_all

    def write(self) -> Program:
        """Inputs, layers, logits."""
        model, tape, h = self.model, self.tape, self.model.hidden_size
        shape: Shape = (B, T, h)
        with tape.segment("embedding"):
            mask = tape.new("mask", (B, T, S), 2 if self.flash else FLOAT32)
            residual = tape.new("residual", shape, FLOAT32, moved=((B, T, h, self.weight_b),))
        for start, count, layer in model.layer_groups():
            label = layer_label(layer)
            if not tape.again(label, count=count, first_layer=start):
                with tape.segment(label, count=count, first_layer=start):
                    self._layer(layer, residual, mask)
        with tape.segment("logits"):
            tape.free(mask)
            normed = tape.new("final norm", shape, FLOAT32, reads=(residual,))
            tape.free(residual)
            rows: tuple[Extent, ...] = (B, T) if self.logits_of_all else (B,)
            V = model.vocab_size
            logits = tape.new(
                "logits",
                (*rows, V),
                FLOAT32,
                flops=(2, *rows, h, V),
                reads=(normed,),
                weight_bytes=h * V * self.weight_b,
            )
            tape.free(normed, logits)
        return tape.program("llama.cpp")

    def _matrix(self, name: str, x: Buffer, out: int) -> Buffer:
        """mul_mat: float32 out of weights in their own dtype."""
        into = x.shape[-1]
        assert isinstance(into, int)
        return self.tape.new(
            name,
            (B, T, out),
            FLOAT32,
            flops=(2, B, T, into, out),
            reads=(x,),
            weight_bytes=into * out * self.weight_b,
        )

    def _layer(self, layer: Layer, residual: Buffer, mask: Buffer) -> None:
        tape, h = self.tape, self.model.hidden_size
        attention, dense = layer.attention, layer.feed_forward
        assert isinstance(attention, GQA)
        assert isinstance(dense, Dense)
        normed = tape.new("attention norm", (B, T, h), FLOAT32, reads=(residual,))
        attended = self._attention(attention, normed, mask)
        tape.free(normed, attended)
        normed = tape.new("feed-forward norm", (B, T, h), FLOAT32, reads=(residual,))
        i = dense.intermediate_size
        up = self._matrix("up", normed, i)
        gate = self._matrix("gate", normed, i) if dense.gated else None
        tape.free(normed)
        active = up if gate is None else tape.new("gated", (B, T, i), FLOAT32, reads=(up, gate))
        if gate is not None:
            tape.free(up, gate)
        down = self._matrix("down", active, h)
        tape.free(active, down)

    def _attention(self, gqa: GQA, normed: Buffer, mask: Buffer) -> Buffer:
        tape, H, D = self.tape, gqa.num_attention_heads, gqa.head_dim
        G = gqa.num_key_value_heads
        q = self._matrix("q", normed, H * D)
        k = self._matrix("k", normed, G * D)
        v = self._matrix("v", normed, G * D)
        tape.free(k, v)  # written to the cache
        per_cell = attention_bytes(
            KV_FORMATS[{"int8": "q8_0", "int4": "q4_0"}.get(self.kv_dtype, self.kv_dtype)],
            gqa,
            batch=1,
            tokens=1,
            computed="fp16",
        ).total_bytes
        cached: tuple[Shape, ...] = ((B, S, per_cell),)
        pairs: Shape = (2 * D, B, H, visible_pairs(gqa.sliding_window))
        if self.flash:
            out = tape.new(
                "attention",
                (B, T, H * D),
                FLOAT32,
                flops=(2, *pairs),
                reads=(q, mask),
                moved=cached,
            )
        else:
            scores = tape.new(
                "scores", (B, H, T, S), FLOAT32, flops=pairs, reads=(q, mask), moved=cached
            )
            out = tape.new("attention", (B, T, H * D), FLOAT32, flops=pairs, reads=(scores,))
            tape.free(scores)
        tape.free(q)
        projected = self._matrix("attention output", out, self.model.hidden_size)
        tape.free(out)
        return projected
