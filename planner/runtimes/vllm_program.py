"""The program of vLLM's forward pass: fused norms in place, one buffer for gate and up.

What the profile run holds is written from vLLM 0.19.1's own code and held against its start-up
logs; nothing of it was traced on a GPU.
"""

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
    Reached,
    S,
    Shape,
    Symbol,
    T,
    minimum,
    visible_pairs,
)
from planner.runtimes.vllm_sampler import ProfileRun, write_sampler
from planner.runtimes.writer import Writer, layer_label


@lru_cache(maxsize=128)
def vllm_program(
    model: Model, dtype: str, kv_dtype: str, profiled: ProfileRun | None = None
) -> Program:
    """A pass of `model`, one GPU's share of a model; None: as it is served."""
    return _Pass(model, dtype, kv_dtype, profiled).write()


class _Pass(Writer):
    """A pass of vLLM, layer by layer."""

    def __init__(
        self, model: Model, dtype: str, kv_dtype: str, profiled: ProfileRun | None
    ) -> None:
        super().__init__(model, dtype)
        self.profiled, self.kv_b = profiled, element_bytes(kv_dtype)
        self.compiled = profiled is not None and profiled.compiled
        self.experts: tuple[Buffer, ...] = ()

    def write(self) -> Program:
        """Embedding or what another stage sent, layers, logits and sampler."""
        model, tape, b, h = self.model, self.tape, self.b, self.model.hidden_size
        shape = (B, T, h)
        with tape.segment("start"):
            if self.profiled is not None:
                self._held(self.profiled)
            residual = tape.new("residual", shape, b, moved=((B, T, h, b),))
        for start, count, layer in model.layer_groups():
            label = layer_label(layer)
            if not tape.again(label, count=count, first_layer=start):
                with tape.segment(label, count=count, first_layer=start):
                    self._layer(layer, residual)
        with tape.segment("sampler"):
            hidden = tape.new("final norm", shape, b, reads=(residual,))
            tape.free(residual)
            if model.lm_head:
                write_sampler(self, hidden, self.profiled)
            tape.free(hidden, *self.experts)
        return tape.program("vllm")

    def _held(self, profiled: ProfileRun) -> None:
        """What comes early and stays to the end of the profile run."""
        tape, h = self.tape, self.model.hidden_size
        if profiled.workspace_bytes:
            tape.new("cuBLAS workspace", (profiled.workspace_bytes,), 1)
        for name, size in profiled.kept:
            tape.new(name, (size,), 1)
        if profiled.later_stage:
            for name in ("hidden states", "residual"):
                tape.new(f"{name} of the stage before", (B, T, h), self.b)
        if profiled.experts_elements:
            shape = (B, T, profiled.experts_elements)
            self.experts = (tape.new("experts' workspace", shape, self.b),)

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
        # the compiled piece between two attentions is called with the first one's output, which its
        # caller holds until the piece is done (compilation/backends.py: split_graph)
        held = (out,) if self.compiled else ()
        tape.free(*(x for x in (out,) if x not in held))
        match layer.feed_forward:
            case Dense() as dense:
                fed = self._dense(dense, attended)
            case MoE() as moe:
                fed = self._experts(moe, attended)
            case _:
                raise AssertionError("refused by check_planned")
        tape.free(attended, fed, *held)

    def _dense(self, dense: Dense, x: Buffer) -> Buffer:
        i = dense.intermediate_size
        both = self.linear("gate_up_proj", x, 2 * i if dense.gated else i, bias=dense.bias)
        flush = self.profiled.flush_bytes if self.profiled and self.compiled else 0
        active = self.tape.new(
            "activation",
            (B, T, i),
            self.b,
            reads=(both,),
            scratch=(((flush,), 1),) if flush else (),
        )
        kept = () if self.compiled else (both,)  # a Python variable holds it until the end
        if self.compiled:
            self.tape.free(both)
        out = self.linear("down_proj", active, self.model.hidden_size, bias=dense.bias)
        self.tape.free(active, *kept)
        return out

    def _experts(self, moe: MoE, x: Buffer) -> Buffer:
        tape, b, h = self.tape, self.b, self.model.hidden_size
        k, i = moe.num_experts_per_tok, moe.moe_intermediate_size
        tape.free(self.linear("router", x, moe.num_experts))
        flat: Shape = (B, T, k)
        reached = Reached(moe.num_experts, k)
        # a profile run has them in the workspace
        own: Shape = (0,) if self.experts else ()
        both = tape.new(
            "experts gate_up",
            own or (*flat, 2 * i),
            b,
            flops=(2, *flat, h, 2 * i),
            reads=(x,),
            moved=((reached, 2 * i * h * b),),
        )
        active = tape.new("experts activation", own or (*flat, i), b, reads=(both,))
        down = tape.new(
            "experts down",
            own or (*flat, h),
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
