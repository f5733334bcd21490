"""The program of vLLM's forward pass: fused norms in place, one buffer for gate and up."""

from __future__ import annotations

from functools import lru_cache

from planner.dtypes import element_bytes
from planner.layers import GQA, MLA, Dense, Layer, MoE
from planner.model import Model
from planner.program import (
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
from planner.runtimes.writer import FLOAT32, Writer, layer_label


@lru_cache(maxsize=128)
def vllm_program(
    model: Model, dtype: str, kv_dtype: str, rows: int | None = None, sorters: int = 0
) -> Program:
    """A pass of `model`; logits of `rows` sequences and `sorters` blocks of top-k, see _Profile."""
    return _Profile(model, dtype, kv_dtype, rows, sorters).write()


class _Profile(Writer):
    """A pass of vLLM: fused norms in place, one buffer for gate and up, sampler on float32 logits.

    Logits of `rows` sequences, or of the batch's (None); `sorters` blocks of top-k, one float32
    row each. What lives is taken from its layer code, not traced: uncalibrated.
    """

    def __init__(
        self, model: Model, dtype: str, kv_dtype: str, rows: int | None, sorters: int
    ) -> None:
        super().__init__(model, dtype)
        self.sorters = sorters
        self.rows, self.kv_b = rows, element_bytes(kv_dtype)

    def write(self) -> Program:
        """Embedding, layers, logits and sampler."""
        model, tape, b, h = self.model, self.tape, self.b, self.model.hidden_size
        shape = (B, T, h)
        with tape.segment("embedding"):
            residual = tape.new("residual", shape, b, moved=((B, T, h, b),))
        for start, count, layer in model.layer_groups():
            label = layer_label(layer)
            if not tape.again(label, count=count, first_layer=start):
                with tape.segment(label, count=count, first_layer=start):
                    self._layer(layer, residual)
        with tape.segment("sampler"):
            # the start-up logs of four models show a second [T, h] beside the sampler's tensors
            hidden = tape.new("final norm", shape, b, reads=(residual,))
            if model.lm_head:
                self._sampler(hidden)
            tape.free(hidden, residual)
        return tape.program("vllm")

    def _layer(self, layer: Layer, residual: Buffer) -> None:
        tape, b, h = self.tape, self.b, self.model.hidden_size
        shape = (B, T, h)
        normed = tape.new("attention norm", shape, b, reads=(residual,), weight_bytes=h * b)
        match layer.attention:
            case GQA(num_attention_heads=H, num_key_value_heads=G, head_dim=D, sliding_window=W):
                qkv = self.linear("qkv_proj", normed, (H + 2 * G) * D)
                flops: Shape = (4 * D, B, H, visible_pairs(W))
                kept: Extent = (
                    S if W is None else Symbol(f"min(S, {W})", lambda d: minimum(d.context, W))
                )
                read: Shape = (2, B, G, kept, D, self.kv_b)
                width = H * D
            case MLA(num_attention_heads=H, kv_lora_rank=d_c, qk_rope_head_dim=d_rope) as mla:
                down = self.linear("qkv_a_proj", normed, (mla.q_lora_rank or 0) + d_c + d_rope)
                q_in = mla.q_lora_rank or h
                qkv = tape.new(
                    "q_b_proj",
                    (B, T, H * mla.qk_head_dim),
                    b,
                    flops=(2, B, T, q_in, H * mla.qk_head_dim),
                    weight_bytes=(
                        q_in * H * mla.qk_head_dim
                        + d_c * H * (mla.qk_nope_head_dim + mla.v_head_dim)
                    )
                    * b,
                )
                tape.free(down)
                flops = (2 * (2 * d_c + d_rope), B, H, visible_pairs(None))
                read = (B, S, d_c + d_rope, self.kv_b)
                width = H * mla.v_head_dim
            case _:
                raise AssertionError("refused by check_planned")
        tape.free(normed)
        out = tape.new("attention", (B, T, width), b, flops=flops, reads=(qkv,), moved=(read,))
        tape.free(qkv)
        attended = self.linear("o_proj", out, h)
        tape.free(out)
        match layer.feed_forward:
            case Dense() as dense:
                fed = self._dense(dense, attended)
            case MoE() as moe:
                fed = self._experts(moe, attended)
            case _:
                raise AssertionError("refused by check_planned")
        tape.free(attended, fed)

    def _dense(self, dense: Dense, x: Buffer) -> Buffer:
        i = dense.intermediate_size
        both = self.linear("gate_up_proj", x, 2 * i if dense.gated else i, bias=dense.bias)
        active = self.tape.new("activation", (B, T, i), self.b, reads=(both,))
        self.tape.free(both)
        out = self.linear("down_proj", active, self.model.hidden_size, bias=dense.bias)
        self.tape.free(active)
        return out

    def _experts(self, moe: MoE, x: Buffer) -> Buffer:
        tape, b, h = self.tape, self.b, self.model.hidden_size
        k, i = moe.num_experts_per_tok, moe.moe_intermediate_size
        tape.free(self.linear("router", x, moe.num_experts))
        flat: Shape = (B, T, k)
        reached = Symbol(
            f"min({moe.num_experts}, {k} · B · T)",
            lambda d: minimum(moe.num_experts, k * d.batch * d.tokens),
        )
        both = tape.new(
            "experts gate_up",
            (*flat, 2 * i),
            b,
            flops=(2, *flat, h, 2 * i),
            reads=(x,),
            moved=((reached, 2 * i * h * b),),
        )
        active = tape.new("experts activation", (*flat, i), b, reads=(both,))
        down = tape.new(
            "experts down",
            (*flat, h),
            b,
            flops=(2, *flat, i, h),
            reads=(active,),
            moved=((reached, i * h * b),),
        )
        out = tape.new("experts output", (B, T, h), b, reads=(down,))
        tape.free(both, active, down)
        if moe.shared is not None:
            tape.free(self._dense(moe.shared, x))
        return out

    def _sampler(self, hidden: Buffer) -> None:
        """Logits, float32 copy, probabilities and noise: rows · V · (b + 12) (vLLM 0.19, V1)."""
        tape, b, V, h = self.tape, self.b, self.model.vocab_size, self.model.hidden_size
        rows: Extent = B if self.rows is None else self.rows
        shape: Shape = (rows, V)
        logits = tape.new(
            "logits", shape, b, flops=(2, rows, h, V), reads=(hidden,), weight_bytes=h * V * b
        )
        held = [logits]
        for name in ("float32 logits", "probabilities", "sampling noise"):
            held.append(tape.new(name, shape, FLOAT32, reads=(held[-1],)))
        held.append(tape.new("top-k rows", (self.sorters, V), FLOAT32))
        tape.free(*held)
