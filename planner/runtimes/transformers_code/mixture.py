"""Mixtures of experts: routers, and integrations/moe.py's grouped products.

Every routed pair of token and expert is a row, sorted by expert, so that sizes do not depend on
what the router picks; only which expert weights are read does.

Shapes.  N = B · T tokens · E experts · k experts per token · i width of an expert
"""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.sort_scratch import sort_scratch
from planner.autograd.tensors import Dims, Tensor
from planner.layers import MoE
from planner.program import B, Reached, Shape, T
from planner.runtimes.transformers_code.parts import PartWriter
from planner.runtimes.writer import BOOL, FLOAT32, INT64

INT32 = 4
SCAN_BYTES = 1023
"""cub's temporary storage of a sum over one tile of numbers; 60 and 64 experts, on an H200."""
GROUP_BYTES = 3 * 8 + 3 * 8 + 3 * 4
"""Of a group: three pointers, three strides, three int32 sizes (GroupMM.cu)."""
TENSOR_MAPS_BYTES = 4 * 128
"""Four descriptors of cutlass for each multiprocessor: 67 584 bytes on an H200's 132."""


class MixtureWriter(PartWriter):
    """<Type>SparseMoeBlock.forward."""

    def mixture(self, moe: MoE, x: Tensor) -> Tensor:
        """Route, run the experts, add what all tokens share."""
        f, h = self.f, self.model.hidden_size
        flat = f.view(x, ((B, T), (h,)))
        if moe.shared is not None and moe.shared_gate:  # qwen2_moe: the shared expert first
            shared = self.feed_forward(moe.shared, flat)
            logits, weights, picks = self._route(moe, flat)
            out = self._experts(moe, flat, weights, picks)
            shared = f.mul(
                f.pointwise(
                    self.linear(flat, "shared_expert_gate", 1, bias=False),
                    "shared gate",
                    "sigmoid",
                    saves="result",
                ),
                shared,
                "shared",
            )
            out = f.view(f.add(out, shared, "experts output"), x.dims)
            del shared, logits, weights, picks
            return out
        logits, weights, picks = self._route(moe, flat)
        out = f.view(self._experts(moe, flat, weights, picks), x.dims)
        if moe.shared is not None:
            out = f.add(out, self.feed_forward(moe.shared, x), "experts output")
        del logits, weights, picks
        return out

    # -- routers: (logits, weights [N, k], picks [N, k]) ------------------------------------------

    def _route(self, moe: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f, E, k = self.f, moe.num_experts, moe.num_experts_per_tok
        if moe.router == "sigmoid-groups":
            return self._route_by_groups(moe, x)
        if self.model.text_type == "deepseek_v2":
            return self._route_deepseek_v2(moe, x)
        logits = self.linear(x, "router", E, bias=False)
        if self.model.text_type == "mixtral":
            chances = f.softmax(f.cast(logits, FLOAT32, "router"), "router")
        else:
            chances = f.softmax(logits, "router", to=FLOAT32)
        weights, picks = f.topk(chances, k, "routing")
        if moe.norm_topk_prob:
            weights = f.divide_(weights, f.sum(weights, "routing"))
        if self.model.text_type != "mixtral":
            weights = f.cast(weights, logits.itemsize, "routing")
        return logits, weights, picks

    def _route_by_groups(self, moe: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """DeepseekV3TopkRouter.forward."""
        f, aten, E, k = self.f, self.aten, moe.num_experts, moe.num_experts_per_tok
        weight = self.weight("router.weight", E, x.sizes[-1])
        logits = f.linear(
            f.cast(x, FLOAT32, "router"), f.cast(weight, FLOAT32, "router"), None, "router"
        )
        scores = f.pointwise(logits, "router", "sigmoid", saves="result")
        choice = aten.elementwise("add.Tensor", "router", scores.detach())
        two: Dims = ((B, T), (moe.n_group,), (moe.group_best,))
        best = aten.new("topk", "routing", two, FLOAT32, reads=(choice,))
        aten.new("topk", "routing", two, INT64)
        best = aten.new("sum.dim_IntList", "routing", two[:2], FLOAT32, reads=(best,))
        choice, named = self._within_groups(moe, choice, best)
        aten.new("topk", "routing", ((B, T), (k,)), FLOAT32, reads=(choice,))
        picks = aten.new("topk", "routing", ((B, T), (k,)), INT64)
        weights = aten.new("gather", "routing", ((B, T), (k,)), FLOAT32, reads=(scores, picks))
        total = None
        if moe.norm_topk_prob:
            total = aten.new("sum.dim_IntList", "routing", ((B, T), ONE), FLOAT32, reads=(weights,))
            total = aten.elementwise("add.Tensor", "routing", total)
        weights = aten.elementwise("mul.Tensor", "routing", weights)
        del scores, choice, best, named, total
        return logits, weights, picks

    def _within_groups(self, moe: MoE, choice: Tensor, best: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Scores [N, E] within the best groups; what the router names on the way, last one first.

        `best` judges groups [N, n_group].
        """
        aten, E = self.aten, moe.num_experts
        aten.new("topk", "routing", ((B, T), (moe.topk_group,)), FLOAT32, reads=(best,))
        index = aten.new("topk", "routing", ((B, T), (moe.topk_group,)), INT64)
        mask = aten.new("zeros_like", "routing", best.dims, FLOAT32)
        column = aten.as_view(mask, (*best.dims, ONE))
        assert column is not None
        spread = aten.expand(column, (*best.dims, (E // moe.n_group,)))
        spread = aten.reshape(spread, choice.dims)
        hidden = aten.new("_to_copy", "routing", choice.dims, BOOL, reads=(spread,))
        hidden = aten.new("bitwise_not", "routing", choice.dims, BOOL, reads=(hidden,))
        choice = aten.elementwise("masked_fill", "router", choice)
        return choice, [spread, mask, index]

    def _route_deepseek_v2(self, moe: MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """DeepseekV2TopkRouter.forward: the weights stay in float32."""
        f, aten, E, k = self.f, self.aten, moe.num_experts, moe.num_experts_per_tok
        weight = self.weight("router.weight", E, x.sizes[-1])
        logits = f.linear(
            f.cast(x, FLOAT32, "router"), f.cast(weight, FLOAT32, "router"), None, "router"
        )
        scores = f.softmax(logits, "router")
        named: list[Tensor] = []
        if moe.group_best == 1:  # "group_limited_greedy"
            groups: Dims = ((B, T), (moe.n_group,))
            best = aten.new("max.dim", "routing", groups, FLOAT32, reads=(scores,))
            aten.new("max.dim", "routing", groups, INT64)
            scores, named = self._within_groups(moe, scores, best)
            named.append(best)
        weights, picks = f.topk(scores, k, "routing")
        weights = f.scale(weights, "routing")
        del scores, named
        return logits, weights, picks

    # -- experts ----------------------------------------------------------------------------------

    def _experts(self, moe: MoE, x: Tensor, weights: Tensor, picks: Tensor) -> Tensor:
        """grouped_mm_experts_forward."""
        f, aten = self.f, self.aten
        h, i, E, k = (
            self.model.hidden_size,
            moe.moe_intermediate_size,
            moe.num_experts,
            picks.sizes[1],
        )
        rows: Dims = ((B, T, k),)
        flat_weights = f.view(weights, rows)
        sorted_picks = aten.new("sort", "routing", rows, INT64, reads=(picks,))
        on_cpu = not self.aten.on_gpu
        scratch = [] if on_cpu else sort_scratch((B, T, k))
        order = aten.new("sort", "routing", rows, INT64, scratch=scratch)
        routed = f.index(x, aten.new("floor_divide", "routing", rows, INT64), rows, "routed tokens")
        sorted_weights = f.index(flat_weights, order, rows, "routing")
        counted = aten.new(
            "_to_copy", "routing", rows, FLOAT32 if on_cpu else INT32, reads=(sorted_picks,)
        )
        counts = aten.new("histc", "routing", ((E,),), FLOAT32)
        scratch = [] if on_cpu else [((SCAN_BYTES,), 1)]
        offsets = aten.new("cumsum", "routing", ((E,),), INT32, scratch=scratch)
        reached = Reached(E, k)
        out = self._grouped_linear(routed, "gate_up_proj", 2 * i, offsets, reached)
        gate, up = f.split(out, (i, i))
        out = f.mul(self.activate(moe.activation, gate), up, "experts gate · up")
        del gate, up
        out = self._grouped_linear(out, "down_proj", h, offsets, reached)
        column = f.view(sorted_weights, (*rows, ONE))
        weighted = f.mul(out, column, "weighted experts")
        del column
        back = aten.new("empty_like", "routing", rows, INT64)
        places = aten.new("arange", "routing", rows, INT64)
        aten.in_place("index_put_", "routing", back, order, places)
        del places
        weighted = f.index(weighted, back, rows, "weighted experts")
        total = f.sum_of(f.view(weighted, ((B, T), (k,), (h,))), "experts output")
        rounded = f.cast(total, self.b, "experts output")
        del sorted_picks, order, routed, sorted_weights, counted, counts, offsets
        del out, weighted, back, total
        return rounded

    def _grouped_linear(
        self, x: Tensor, module: str, out: int, offsets: Tensor, reached: Reached
    ) -> Tensor:
        """_grouped_linear: x [rows, in] · Wᵀ of each row's expert."""
        into, (experts,) = x.sizes[-1], offsets.sizes
        weight = self.f.transpose(self.weight(f"experts.{module}", experts, out, into), 1, 2)
        read = (reached, out * into * self.b)
        return self.f.grouped_mm(
            x,
            weight,
            offsets,
            f"experts {module}",
            read=read,
            scratch=self._grouped_scratch(experts),
        )

    def _grouped_scratch(self, experts: int) -> list[tuple[Shape, int]]:
        """GroupMM.cu in bf16 on 9.x: each group's pointers, strides and sizes; tensor maps of each
        multiprocessor. Other kernels go group by group and need none, or were not watched (10.x).
        """
        what = self.what
        hopper = self.aten.on_gpu and (what.capability or "").split(".")[0] == "9"
        if not hopper or what.dtype != "bf16":
            return []
        arguments = (experts, GROUP_BYTES)
        return [(arguments, 1), ((what.multiprocessors, TENSOR_MAPS_BYTES), 1)]
