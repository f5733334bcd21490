"""Mixtures of experts of attnlab, op by op: mixture.py and routers.py there.

Every pair of token and expert is a row, R = k · B · T of them, so that no size depends on what the
router picks, by a loop over the experts either; only which experts' weights are read does
(planner/routing.py).
"""

from __future__ import annotations

from typing import Literal

from planner.dtypes import element_bytes
from planner.layers import Dense, MoE
from planner.model import Model
from planner.program import B, Buffer, Reached, Shape, T
from planner.runtimes.writer import BOOL, FLOAT32, INT64, Writer

INT32 = 4
Experts = Literal["grouped", "loop"]
GROUPED_DTYPES = ("bf16", "fp16", "fp32")
GROUPED_BYTES = 16
"""What a row of grouped_mm's matrices has to be a multiple of (torch 2.13, GroupedMMUtils.h)."""


def chosen_experts(model: Model, dtype: str) -> Experts:
    """What attnlab multiplies experts by where nobody says: mixture.choose_experts there."""
    widths = set()
    for layer in model.layer_kinds():
        if isinstance(layer.feed_forward, MoE):
            moe = layer.feed_forward
            widths |= {moe.moe_intermediate_size, moe.latent_size or model.hidden_size}
    odd = any(width * element_bytes(dtype) % GROUPED_BYTES for width in widths)
    return "loop" if odd or dtype not in GROUPED_DTYPES else "grouped"


class MixtureWriter(Writer):
    """Writes the feed-forward of a block that is a mixture."""

    experts: Experts

    def dense(self, dense: Dense, x: Buffer) -> Buffer:
        """FeedForward.forward."""
        raise NotImplementedError

    def activate(
        self,
        activation: str,
        x: Buffer,
        shape: Shape,
        *,
        consumed: bool = True,
        loop: str = "",
    ) -> Buffer:
        """The activation of (a part of) x."""
        raise NotImplementedError

    def mixture(self, moe: MoE, x: Buffer) -> Buffer:
        """Mixture.forward."""
        tape, b, h = self.tape, self.b, self.model.hidden_size
        weights, picks = self._route(moe, x)
        if moe.latent_size is None:
            out = self._experts(moe, x, weights, picks)
        else:
            latent = self.linear("fc1_latent_proj", x, moe.latent_size, bias=moe.latent_bias)
            made = self._experts(moe, latent, weights, picks)
            tape.free(latent)
            out = self.linear("fc2_latent_proj", made, h, bias=moe.latent_bias)
            tape.free(made)
        tape.free(weights, picks)
        if moe.shared is None:
            return out
        shared = self.dense(moe.shared, x)
        if moe.shared_gate:
            gate = self.linear("shared_expert_gate", x, 1)
            gate = self.replaced(tape.new("shared gate", gate.shape, b, reads=(gate,)), gate)
            weighed = tape.new("shared", shared.shape, b, reads=(shared, gate))
            tape.free(gate)
            shared = self.replaced(weighed, shared)
        total = tape.new("experts output", x.shape, b, reads=(out, shared))
        tape.free(out, shared)
        return total

    # -- Gate.forward: (weights, picks), [B, T, k] both -------------------------------------------

    def _route(self, moe: MoE, x: Buffer) -> tuple[Buffer, Buffer]:
        tape, E, k = self.tape, moe.num_experts, moe.num_experts_per_tok
        table, few = (B, T, E), (B, T, k)
        logits = self._logits(moe, x)
        if moe.router == "sparsemixer":
            return self._sparsemixer(k, logits)
        word = "softmax" if moe.router == "softmax" else "sigmoid"
        kernel = "_softmax" if moe.router == "softmax" else "sigmoid"
        scores = tape.new(f"router {word}", table, FLOAT32, reads=(logits,), kernel=kernel)
        choice, owned = (logits, True) if moe.router == "sigmoid" else (scores, False)
        if not owned:
            tape.free(logits)
        if moe.correction_bias or moe.router == "sigmoid-groups":
            choice, owned = tape.new("corrected scores", table, FLOAT32, reads=(choice,)), True
        if moe.n_group > 1:
            best = self._within_best_groups(moe, choice)
            tape.free(choice if owned else None)
            choice, owned = best, True
        picks = self._topk("picks", few, choice)
        tape.free(choice if owned else None)
        weights = self._gathered("routing weights", few, scores, picks)
        tape.free(scores)
        if moe.norm_topk_prob:
            total = tape.new("weights' sum", (B, T, 1), FLOAT32, reads=(weights,))
            total = self.replaced(tape.new("weights' sum", (B, T, 1), FLOAT32), total)
            normed = tape.new("routing weights", few, FLOAT32, reads=(weights, total))
            tape.free(total)
            weights = self.replaced(normed, weights)
        if moe.routed_scaling_factor != 1.0:
            scaled = tape.new("routing weights", few, FLOAT32, reads=(weights,))
            weights = self.replaced(scaled, weights)
        return self._narrow(weights, few), picks

    def _logits(self, moe: MoE, x: Buffer) -> Buffer:
        """Float32, [B, T, E]; by DeepSeek-V3's router computed in it too."""
        tape, b, E, h = self.tape, self.b, moe.num_experts, self.model.hidden_size
        if moe.router != "sigmoid-groups" or b == FLOAT32:
            logits = self.linear("router", x, E, bias=moe.bias)
            if b != FLOAT32:
                wide = tape.new("float32 logits", logits.shape, FLOAT32, reads=(logits,))
                logits = self.replaced(wide, logits)
            return logits
        bias = tape.new("float32 bias", (E,), FLOAT32, weight_bytes=E * b) if moe.bias else None
        wide = tape.new("float32 hidden states", x.shape, FLOAT32, reads=(x,))
        weight = tape.new("float32 router", (E, h), FLOAT32, weight_bytes=E * h * b)
        logits = tape.new(
            "router", (B, T, E), FLOAT32, flops=(2, B, T, h, E), reads=(wide, weight), kernel="mm"
        )
        tape.free(wide, weight, bias)
        return logits

    def _within_best_groups(self, moe: MoE, choice: Buffer) -> Buffer:
        """within_best_groups()."""
        tape, groups = self.tape, (B, T, moe.n_group)
        judged = (*groups, moe.group_best)
        values = tape.new("best of a group", judged, FLOAT32, reads=(choice,), kernel="topk",
                          scratch=((judged, INT64),))  # fmt: skip
        best = self.replaced(tape.new("groups", groups, FLOAT32, reads=(values,)), values)
        kept = self._topk("best groups", (B, T, moe.topk_group), best)
        hidden = tape.new("hidden groups", groups, BOOL, reads=(kept,))
        out = tape.new("scores of the best groups", choice.shape, FLOAT32, reads=(choice, hidden))
        tape.free(best, kept, hidden)
        return out

    def _sparsemixer(self, k: int, logits: Buffer) -> tuple[Buffer, Buffer]:
        """sparsemixer()."""
        tape, table, column = self.tape, logits.shape, (B, T, 1)
        weights: list[Buffer] = []
        picks: list[Buffer] = []
        left = logits
        named: list[Buffer | None] = [None, None, None]
        for _ in range(k):
            best = tape.new("best expert", column, FLOAT32, reads=(left,))
            picks.append(tape.new("best expert", column, INT64))
            tape.free(named[0])
            gap = tape.new("behind", table, FLOAT32, reads=(logits, best))
            size = tape.new("behind", table, FLOAT32, reads=(logits,))
            size = self.replaced(tape.new("behind", table, FLOAT32, reads=(size,)), size)
            behind = tape.new("behind", table, FLOAT32, reads=(gap, size))
            tape.free(gap, size, named[1])
            far = tape.new("far", table, BOOL, reads=(behind,))
            masked = self.replaced(tape.new("near", table, FLOAT32, reads=(left, far)), far)
            near = self.replaced(tape.new("softmax", table, FLOAT32, reads=(masked,)), masked)
            tape.free(named[2])
            weights.append(self._gathered("routing weights", column, near, picks[-1]))
            rest = tape.new("left", table, FLOAT32, reads=(left,), kernel="scatter")
            tape.free(left if left is not logits else None)
            left, named = rest, [best, behind, near]
        out = tape.new("routing weights", (B, T, k), FLOAT32, reads=tuple(weights), kernel="cat")
        picked = tape.new("picks", (B, T, k), INT64, reads=tuple(picks), kernel="cat")
        tape.free(*weights, *picks, left, *named)
        out = self._narrow(out, (B, T, k))
        tape.free(logits)
        return out, picked

    def _topk(self, name: str, shape: Shape, of: Buffer) -> Buffer:
        """Indices; the values are dropped."""
        return self.tape.new(
            name, shape, INT64, reads=(of,), scratch=((shape, FLOAT32),), kernel="topk"
        )

    def _gathered(self, name: str, shape: Shape, of: Buffer, index: Buffer) -> Buffer:
        read = ((*shape, of.itemsize),)
        return self.tape.new(name, shape, of.itemsize, reads=(index,), moved=read, kernel="gather")

    def _narrow(self, weights: Buffer, shape: Shape) -> Buffer:
        if self.b == FLOAT32:
            return weights
        return self.replaced(
            self.tape.new("routing weights", shape, self.b, reads=(weights,)), weights
        )

    # -- Experts.forward --------------------------------------------------------------------------

    def _experts(self, moe: MoE, x: Buffer, weights: Buffer, picks: Buffer) -> Buffer:
        tape, b, i = self.tape, self.b, moe.moe_intermediate_size
        E, k, width = moe.num_experts, moe.num_experts_per_tok, x.shape[-1]
        rows = (B, T, k)
        of_row = tape.new("rows by expert", rows, INT64, reads=(picks,), kernel="sort")
        order = tape.new("rows' order", rows, INT64)
        counted = tape.new("experts", (E,), INT64, kernel="arange")
        ends = tape.new("rows' ends", (E,), INT32, reads=(of_row, counted), kernel="searchsorted")
        tape.free(counted)
        token = tape.new("rows' tokens", rows, INT64, reads=(order,), kernel="floor_divide")
        routed = self._rows("routed tokens", (*rows, width), x, token)
        tape.free(token)
        if moe.router == "sigmoid":
            column = self._gathered("routing weights", rows, weights, order)
            weighed = tape.new(
                "weighed tokens", routed.shape, b, reads=(routed, column), loop="strided"
            )
            routed = self.replaced(weighed, routed)
            tape.free(column)

        def linear(name: str, x: Buffer, out: int) -> Buffer:
            return self._linear(moe, name, x, out, of_row, ends)

        wide: Shape = (*rows, i)
        if moe.layout == "flat":
            gate = linear("gate_proj", routed, i)
            gate = self.activate(moe.activation, gate, wide)
            up = linear("up_proj", routed, i)
            inner = tape.new("experts gate · up", wide, b, reads=(gate, up))
            tape.free(up, routed, gate)
        else:
            name = "gate_up_proj" if moe.gated else "up_proj"
            both = self.replaced(linear(name, routed, 2 * i if moe.gated else i), routed)
            inner = self.replaced(self._gate(moe, both, wide), both)
        assert isinstance(width, int)
        out = self.replaced(linear("down_proj", inner, width), inner)
        tape.free(of_row, ends)
        place = tape.new("rows' places", rows, INT64, kernel="arange")
        back = tape.new("rows' places", rows, INT64, reads=(order, place), kernel="scatter")
        sorted_back = self._rows("experts by token", (*rows, width), out, back)
        tape.free(back)
        out = self.replaced(sorted_back, out)
        tape.free(order, place)
        if moe.router != "sigmoid":
            weighed = tape.new(
                "weighed experts", out.shape, b, reads=(out, weights), loop="strided"
            )
            out = self.replaced(weighed, out)
        total = tape.new("experts output", (B, T, width), b, reads=(out,), kernel="sum")
        return self.replaced(total, out)

    def _gate(self, moe: MoE, x: Buffer, wide: Shape) -> Buffer:
        """Experts._activate, on halves that lie row by row."""
        tape, b = self.tape, self.b
        half = ((*wide, b),)

        def step(*reads: Buffer, name: str = "experts gate · up") -> Buffer:
            moved = () if reads else half
            return tape.new(name, wide, b, reads=reads, moved=moved, loop="strided")

        if not moe.gated:
            return self.activate(moe.activation, x, wide, consumed=False)
        limited = (step(), step()) if moe.swiglu_limit is not None else ()
        gate = limited[0] if limited else x
        if moe.swiglu_alpha is None:
            active = self.activate(moe.activation, gate, wide, consumed=False, loop="strided")
        else:
            scaled = step()
            sigmoid = self.replaced(step(scaled), scaled)
            active = self.replaced(step(sigmoid), sigmoid)
            up = step()
            out = step(active, up)
            tape.free(active, up, *limited)
            return out
        out = step(active, gate)
        tape.free(active, *limited)
        return out

    def _linear(
        self, moe: MoE, name: str, x: Buffer, out: int, of_row: Buffer, ends: Buffer
    ) -> Buffer:
        """Each row times its expert's matrix: one op, or a product an expert and all behind."""
        tape, b, E, k = self.tape, self.b, moe.num_experts, moe.num_experts_per_tok
        *rows, into = x.shape
        assert isinstance(into, int)
        shape = (*rows, out)
        reached = Reached(E, k)
        if self.experts == "loop":
            self._sizes(E, ends)
        made = tape.new(
            f"experts {name}",
            shape,
            b,
            flops=(2, *rows, into, out),
            reads=(x,),
            moved=((reached, into * out * b),),
            kernel="_grouped_mm",
        )
        if self.experts == "loop":
            made = self.replaced(
                tape.new("experts' rows", shape, b, reads=(made,), kernel="cat"), made
            )
        if moe.bias:
            bias = tape.new("experts' bias", shape, b, reads=(of_row,), moved=((*shape, b),),
                            kernel="index")  # fmt: skip
            total = tape.new("experts with bias", shape, b, reads=(made, bias))
            tape.free(bias)
            made = self.replaced(total, made)
        return made

    def _sizes(self, E: int, ends: Buffer) -> None:
        """Rows of each expert, which the host waits for."""
        tape = self.tape
        zero = tape.new("no rows", (1,), INT32)
        both = tape.new("rows' ends", (E + 1,), INT32, reads=(ends, zero), kernel="cat")
        tape.free(tape.new("rows' sizes", (E,), INT32, reads=(both,)), both, zero)

    def _rows(self, name: str, shape: Shape, of: Buffer, index: Buffer) -> Buffer:
        """Rows of a table: what is read is as large as what is written."""
        read = ((*shape, of.itemsize),)
        return self.tape.new(name, shape, of.itemsize, reads=(index,), moved=read, kernel="index")
