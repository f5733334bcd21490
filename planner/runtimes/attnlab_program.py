"""Forward passes of attnlab (kernels/attnlab/transformer.py) as programs, op by op.

The cache is opened before the pass. A module's input lives until the module returns, a block's
input until the model's loop takes its output. Attention is in attnlab_attention.py, what a cache
holds and makes in attnlab_cache_program.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from planner.dtypes import element_bytes
from planner.kv_formats import KvFormat
from planner.layers import GQA, MLA, Dense, Layer, LearnedPositions, MoE, Norm, RoPE, Sinusoidal
from planner.model import Model
from planner.program import B, Buffer, Extent, Program, Shape, T
from planner.runtimes.attnlab_cache_program import CacheKind, CacheProgram
from planner.runtimes.attnlab_latent import Latent, LatentWriter
from planner.runtimes.attnlab_mixture import Experts, MixtureWriter, chosen_experts
from planner.runtimes.writer import FLOAT32, INT64, layer_label


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Which pass: a prefill (whole, or a chunk of one) or decode, over which cache, and how.

    `latent`: how latent attention runs; None: expanded in a prefill, absorbed in a decode step.
    """

    kind: Literal["prefill", "decode"]
    attention: Literal["sdpa", "naive"]
    dtype: str
    kv_dtype: str
    logits: Literal["all", "last"]
    cache: CacheKind = "static"
    block_tokens: int = 16
    form: KvFormat | None = None
    experts: Experts | None = None
    latent: Latent | None = None


@lru_cache(maxsize=128)
def forward_program(model: Model, what: Pass) -> Program:
    """One forward pass over a cache, from token ids to logits.

    `model` has grouped-query or latent attention only. `what.experts`: how experts are
    multiplied, None: as attnlab chooses.
    """
    return _Forward(model, what).write()


class _Forward(LatentWriter, MixtureWriter):
    """Walks through Transformer.forward and writes the tape."""

    def __init__(self, model: Model, what: Pass) -> None:
        super().__init__(model, what.dtype)
        self.what, self.attention, self.norm = what, what.attention, self._norm
        self.latent = what.latent or ("expanded" if what.kind == "prefill" else "absorbed")
        self.experts = what.experts or chosen_experts(model, what.dtype)
        self.cache = CacheProgram(
            self.tape,
            what.cache,
            b=self.b,
            kv_b=self.b if what.form is not None else element_bytes(what.kv_dtype),
            block_tokens=what.block_tokens,
            form=what.form,
        )

    def write(self) -> Program:
        """The whole pass."""
        model, tape = self.model, self.tape
        self.cache.open(model)
        with tape.segment("embedding"):
            self.cache.prepare(model)
            self._embed()
            self.make_masks()
        for start, count, layer in model.layer_groups():
            label = layer_label(layer)
            if not tape.again(label, count=count, first_layer=start):
                with tape.segment(label, count=count, first_layer=start):
                    self._block(layer)
        with tape.segment("head"):
            self._head()
        return tape.program(f"attnlab {self.what.kind}")

    def _embed(self) -> None:
        model, tape, b, h = self.model, self.tape, self.b, self.model.hidden_size
        width = model.embedding_size or h
        rows = ((B, T, width, b),)
        added = isinstance(model.positions, LearnedPositions | Sinusoidal)
        steps = [
            model.embedding_norm is not None,
            model.embedding_size is not None,
            model.embedding_scale is not None,
            added,
        ]
        self.rotary: tuple[Buffer, ...] = ()
        if not any(steps):
            tape.new("hidden states", (B, T, h), b, moved=rows, into=self.hidden)
        else:
            x = tape.new("input embeddings", (B, T, width), b, moved=rows)
            if model.embedding_norm is not None:
                last = not any(steps[1:])
                x = self.replaced(self._norm(model.embedding_norm, x, "embedding norm"), x)
                if last:
                    self._become_hidden(x)
            if model.embedding_size is not None:
                x = self.replaced(self.linear("project_in", x, h), x)
            if model.embedding_scale is not None:
                scaled = None if added else self.hidden
                x = self.replaced(
                    tape.new("hidden states", (B, T, h), b, reads=(x,), into=scaled), x
                )
            if added:
                self._add_positions(x)
        if isinstance(model.positions, RoPE):
            for rope in (model.positions, model.local_positions):
                if rope is not None:
                    self._rotary_tables(rope)

    def _become_hidden(self, x: Buffer) -> None:
        """The same storage under the name that blocks know."""
        self.tape.free(x)
        self.tape.new("hidden states", self.hidden.shape, self.b, into=self.hidden)

    def _add_positions(self, x: Buffer) -> None:
        tape, b, h, positions = self.tape, self.b, self.model.hidden_size, self.model.positions
        rows, made = None, []
        if isinstance(positions, LearnedPositions):
            if positions.offset:
                rows = tape.new("positions", (T,), INT64)
            table = tape.new("position embeddings", (T, h), b, moved=((T, h, b),))
        else:
            half = -(-h // 2)
            exponents = tape.new("sinusoids", (half,), FLOAT32)
            exponents = self.replaced(tape.new("sinusoids", (half,), FLOAT32), exponents)
            made = [tape.new("sinusoids", (T, half), FLOAT32) for _ in ("angles", "sin", "cos")]
            table = tape.new("sinusoids", (T, 2 * half), FLOAT32)
            tape.free(*made[1:])
            if b != FLOAT32:
                table = self.replaced(tape.new("sinusoids", (T, h), b), table)
            tape.free(exponents, made[0])
        tape.new("hidden states", (B, T, h), b, reads=(x, table), into=self.hidden)
        tape.free(table, x, rows)

    def _rotary_tables(self, rope: RoPE) -> None:
        tape, b, D = self.tape, self.b, rope.rotary_dim
        wide = tape.new("rotary tables", (T,), FLOAT32)
        angles = tape.new("rotary tables", (T, D // 2), FLOAT32)
        tape.free(wide)
        double = tape.new("rotary tables", (T, D), FLOAT32)
        tables = []
        for _ in ("cos", "sin"):
            table = tape.new("rotary tables", (T, D), FLOAT32, reads=(double,))
            if scales_tables(rope):
                table = self.replaced(tape.new("rotary tables", (T, D), FLOAT32), table)
            if b != FLOAT32:
                narrow = tape.new("rotary tables", (T, D), b, reads=(table,))
                table = self.replaced(narrow, table)
            tables.append(table)
        tape.free(double, angles)
        self.rotary += tuple(tables)

    def _head(self) -> None:
        model, tape, b = self.model, self.tape, self.b
        tape.free(*self.rotary)
        self.free_masks()
        self.cache.close()
        rows: Extent = T if self.what.logits == "all" else 1
        h, V = model.hidden_size, model.vocab_size
        last = self.hidden
        if model.final_norm is not None:
            kept = Buffer(name="hidden states", shape=(B, rows, h), itemsize=b)
            last = self._norm(model.final_norm, kept, "final norm")
            tape.free(self.hidden)
        if model.embedding_size is not None:
            kept = Buffer(name="hidden states", shape=(B, rows, h), itemsize=b)
            last = self.replaced(self.linear("project_out", kept, model.embedding_size), last)
        shape: Shape = (B, rows, V)
        width = model.embedding_size or h
        logits = tape.new(
            "logits",
            shape,
            b,
            flops=(2, B, rows, width, V),
            reads=(last,),
            weight_bytes=width * V * b,
        )
        tape.free(last)
        steps = (model.logit_scale is not None) + 3 * (model.final_logit_softcapping is not None)
        for _ in range(steps):
            logits = self.replaced(tape.new("logits", shape, b, reads=(logits,)), logits)

    def _norm(self, norm: Norm, x: Buffer, name: str) -> Buffer:
        tape, b, shape = self.tape, self.b, x.shape
        h = shape[-1]
        assert isinstance(h, int)
        column = (*shape[:-1], 1)
        if norm.kind == "layernorm":
            statistics = ((column, b), (column, b))
            factor = tape.new(name, (h,), b) if norm.plus_one else None
            out = tape.new(
                name,
                shape,
                b,
                reads=(x,),
                weight_bytes=2 * h * b,
                scratch=statistics,
                kernel="native_layer_norm",
            )
            tape.free(factor)
            return out
        wide = x if b == FLOAT32 else tape.new(name, shape, FLOAT32, reads=(x,))
        square = tape.new(name, shape, FLOAT32, reads=(wide,))
        averaged = tape.new(name, column, FLOAT32, reads=(square,), kernel="mean")
        mean = self.replaced(averaged, square)
        shifted = self.replaced(tape.new(name, column, FLOAT32, reads=(mean,)), mean)
        inverse = self.replaced(tape.new(name, column, FLOAT32, reads=(shifted,)), shifted)
        scaled = tape.new(name, shape, FLOAT32, reads=(wide,), loop="strided")
        tape.free(inverse, *self.copy_of(wide, x))
        if not norm.weight:
            narrow = scaled if b == FLOAT32 else tape.new(name, shape, b, reads=(scaled,))
            tape.free(*self.copy_of(scaled, narrow))
            return narrow
        if norm.plus_one:
            weight = tape.new(name, (h,), FLOAT32, weight_bytes=h * b) if b != FLOAT32 else None
            factor = tape.new(name, (h,), FLOAT32)
            tape.free(weight)
            out = tape.new(name, shape, FLOAT32, reads=(scaled,), loop="strided")
            tape.free(factor)
            if b != FLOAT32:
                out = self.replaced(tape.new(name, shape, b, reads=(out,)), out)
            tape.free(scaled)
            return out
        narrow = scaled if b == FLOAT32 else tape.new(name, shape, b, reads=(scaled,))
        out = tape.new(name, shape, b, reads=(narrow,), weight_bytes=h * b, loop="strided")
        tape.free(*self.copy_of(narrow, scaled), scaled)
        return out

    def _block(self, layer: Layer) -> None:
        """Block.forward, by where the norms stand."""
        assert layer.feed_forward is not None
        attention, fed, x = _attention(layer), layer.feed_forward, self.hidden
        match layer.placement:
            case "pre" | "sandwich":
                after = layer.placement == "sandwich"
                middle = self._part(layer, x, attention, before=True, after=after)
                self._part(layer, middle, fed, before=True, after=after, into=x)
                self.tape.free(middle, x)
            case "post":
                middle = self._part(layer, x, attention, before=False, after=True)
                self._part(layer, middle, fed, before=False, after=True, into=x)
                self.tape.free(middle, x)
            case "post-sum":
                total = self._part(layer, x, attention, before=False, after=False)
                middle = self.replaced(self._norm(layer.norm, total, "attention norm"), total)
                total = self._part(layer, middle, fed, before=False, after=False)
                last = self._norm(layer.norm, total, "feed-forward norm")
                self.tape.free(total, middle, x, last)
                self.tape.new("residual", x.shape, self.b, into=x)
            case _:
                self._parallel(layer, attention, fed)

    def _part(
        self,
        layer: Layer,
        x: Buffer,
        part: GQA | MLA | Dense | MoE,
        *,
        before: bool,
        after: bool,
        into: Buffer | None = None,
    ) -> Buffer:
        """x + multiplier · norm(f(norm(x))), with the norms that there are."""
        tape = self.tape
        name = "attention" if isinstance(part, GQA | MLA) else "feed-forward"
        normed = self._norm(layer.norm, x, f"{name} norm") if before else None
        out = self._run(part, normed or x)
        tape.free(normed)
        if after:
            out = self.replaced(self._norm(layer.norm, out, "post norm"), out)
        named = out if before and after and layer.residual_multiplier is not None else None
        if named is None:
            out = self._scaled(layer, out)
        else:  # what a sandwich's norm makes has a name until the sum is there
            out = tape.new("scaled", out.shape, self.b, reads=(out,))
        total = tape.new("residual", x.shape, self.b, reads=(x, out), into=into)
        tape.free(out, named)
        return total

    def _run(self, part: GQA | MLA | Dense | MoE, x: Buffer) -> Buffer:
        match part:
            case GQA():
                return self.attention_block(part, x)
            case MLA():
                return self.latent_block(part, x)
            case MoE():
                return self.mixture(part, x)
        return self.dense(part, x)

    def _scaled(self, layer: Layer, out: Buffer) -> Buffer:
        if layer.residual_multiplier is None:
            return out
        return self.replaced(self.tape.new("scaled", out.shape, self.b, reads=(out,)), out)

    def _parallel(self, layer: Layer, attention: GQA | MLA, fed: Dense | MoE) -> None:
        """Attention and feed-forward on one norm's output, or on a norm's each."""
        tape, x, b = self.tape, self.hidden, self.b
        one = layer.placement == "parallel"
        normed = self._norm(layer.norm, x, "norm")
        out = self._scaled(layer, self._run(attention, normed))
        if not one:
            tape.free(normed)
        middle = tape.new("residual", x.shape, b, reads=(x, out))
        tape.free(out)
        if not one:
            normed = self._norm(layer.norm, x, "feed-forward norm")
        out = self._run(fed, normed)
        if not one:
            tape.free(normed)
        out = self._scaled(layer, out)
        tape.new("residual", x.shape, b, reads=(middle, out), into=x)
        tape.free(out, middle, x, *([normed] if one else []))

    def dense(self, dense: Dense, x: Buffer) -> Buffer:
        """FeedForward.forward."""
        tape, b, i, h = self.tape, self.b, dense.intermediate_size, self.model.hidden_size
        wide = (*x.shape[:-1], i)
        if dense.fused_gate_up:
            both = self.linear("gate_up_proj", x, 2 * i, bias=dense.bias)
            active = self.activate(dense.activation, both, wide, consumed=False, loop="strided")
            product = tape.new("gate · up", wide, b, reads=(both, active), loop="strided")
            tape.free(active, both)
        elif dense.gated:
            gate = self.linear("gate_proj", x, i, bias=dense.bias)
            active = self.activate(dense.activation, gate, wide)
            up = self.linear("up_proj", x, i, bias=dense.bias)
            product = tape.new("gate · up", wide, b, reads=(active, up))
            tape.free(active, up)
        else:
            up = self.linear("up_proj", x, i, bias=dense.bias)
            product = self.activate(dense.activation, up, wide)
        out = self.linear("down_proj", product, h, bias=dense.bias)
        tape.free(product)
        return out

    def activate(
        self,
        activation: str,
        x: Buffer,
        shape: Shape,
        *,
        consumed: bool = True,
        loop: str = "",
    ) -> Buffer:
        """The activation of (a part of) x; those that torch does not fuse op by op.

        `loop`: how one kernel goes over a part of x (program.LOOPS).
        """
        tape, b = self.tape, self.b

        def step(*reads: Buffer, kernel: str = "") -> Buffer:
            return tape.new(activation, shape, b, reads=reads, kernel=kernel)

        match activation:
            case "gelu_new":  # 0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³))), the inner sum is named
                inner = step(x)
                for _ in ("0.044715 ·", "x +", "√(2/π) ·"):
                    inner = self.replaced(step(inner), inner)
                half, tanh = step(x), step(inner, kernel="tanh")
                plus = self.replaced(step(tanh), tanh)
                out = tape.new("activation", shape, b, reads=(half, plus))
                tape.free(half, plus, inner)
            case "gelu_fast":  # 0.5·x·(1 + tanh(0.79…·x·(1 + 0.044715·x·x)))
                half, slope = step(x), step(x)
                cube = step(x)
                for _ in ("· x", "1 +"):
                    cube = self.replaced(step(cube), cube)
                inner = step(slope, cube)
                tape.free(slope, cube)
                for kernel in ("tanh", ""):  # and 1 +
                    inner = self.replaced(step(inner, kernel=kernel), inner)
                out = tape.new("activation", shape, b, reads=(half, inner))
                tape.free(half, inner)
            case "quick_gelu":
                scaled = step(x)
                gate = self.replaced(step(scaled), scaled)
                out = tape.new("activation", shape, b, reads=(x, gate))
                tape.free(gate)
            case "relu2":
                kept = step(x)
                out = tape.new("activation", shape, b, reads=(kept,))
                tape.free(kept)
            case _:
                out = tape.new("activation", shape, b, reads=(x,), loop=loop)
        if consumed:
            tape.free(x)
        return out


SCALED_TABLES = ("yarn", "longrope", "su")
"""Rotary types whose tables are multiplied by an attention factor, but for a factor of 1."""


def scales_tables(rope: RoPE) -> bool:
    """Whether cos and sin are multiplied: not by what is 1, nor by mscale over an equal one."""
    given = dict(rope.scaling)
    weights = given.get("mscale"), given.get("mscale_all_dim")
    if given.get("attention_factor") is not None:
        return rope.rope_type in SCALED_TABLES and given["attention_factor"] != 1.0
    if rope.rope_type == "yarn" and all(weights):
        return weights[0] != weights[1]
    return rope.rope_type in SCALED_TABLES


def _attention(layer: Layer) -> GQA | MLA:
    assert isinstance(layer.attention, GQA | MLA)
    return layer.attention
