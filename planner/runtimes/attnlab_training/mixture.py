"""mixture.py of attnlab: what is routed, as long as torch multiplies all experts in one op."""

from __future__ import annotations

from planner.autograd.aten import ONE
from planner.autograd.tensors import Dims, Tensor
from planner.errors import ConfigError
from planner.layers import MLA, MoE
from planner.model import Model
from planner.program import B, Reached, T
from planner.runtimes.attnlab_mixture import INT32, chosen_experts
from planner.runtimes.attnlab_training.feed_forward import FeedForwardWriter
from planner.runtimes.writer import BOOL, FLOAT32, INT64


def check_trained(model: Model, dtype: str) -> None:
    """ConfigError for latent attention and mixtures whose training is not written."""
    for layer in model.layer_kinds():
        if isinstance(layer.attention, MLA):
            raise ConfigError(
                f"training of {model.model_type}'s latent attention (MLA) is not planned for "
                "runtime=attnlab yet"
            )
        moe = layer.feed_forward
        if not isinstance(moe, MoE):
            continue
        why = {
            f"in {dtype} with widths that torch's grouped matmul does not take": chosen_experts(
                model, dtype
            )
            == "loop",
            "whose router is sparsemixer": moe.router == "sparsemixer",
            "whose correction is a parameter without a gradient": moe.correction_bias,
        }
        for part, refused in why.items():
            if refused:
                raise ConfigError(
                    f"training of {model.model_type}'s experts {part} is not planned for "
                    "runtime=attnlab yet"
                )


class MixtureWriter(FeedForwardWriter):
    """Mixture.forward and what it calls."""

    def mixture(self, moe: MoE, x: Tensor) -> Tensor:
        """Mixture.forward."""
        f, h = self.f, self.model.hidden_size
        dims, x = x.dims, f.view(x, ((B, T), (h,)))
        weights, picks = self._route(moe, x)
        if moe.latent_size is None:
            out = self._experts(moe, x, weights, picks)
        else:
            bias = moe.latent_bias
            latent = self.linear(x, "fc1_latent_proj", moe.latent_size, bias=bias)
            out = self._experts(moe, latent, weights, picks)
            del latent
            out = self.linear(out, "fc2_latent_proj", h, bias=bias)
        del weights, picks
        if moe.shared is not None:
            shared = self.feed_forward(moe.shared, x)
            if moe.shared_gate:
                gate = f.pointwise(
                    self.linear(x, "shared_expert_gate", 1, bias=False),
                    "shared gate",
                    "sigmoid",
                    saves="result",
                )
                shared = f.mul(shared, gate, "shared")
                del gate
            out = f.add(out, shared, "experts output")
        return f.view(out, dims)

    def _route(self, moe: MoE, x: Tensor) -> tuple[Tensor, Tensor]:
        """Gate.forward."""
        f, aten, E, k = self.f, self.aten, moe.num_experts, moe.num_experts_per_tok
        few: Dims = ((B, T), (k,))
        if moe.router == "sigmoid-groups":
            weight = self.weight("gate", E, x.sizes[-1])
            bias = f.cast(self.weight("gate.bias", E), FLOAT32, "router") if moe.bias else None
            wide = f.cast(x, FLOAT32, "router")
            wide_weight = f.cast(weight, FLOAT32, "router")
            logits = f.linear(wide, wide_weight, bias, "router")
            del wide, wide_weight, weight, bias
        else:
            logits = f.cast(self.linear(x, "gate", E, bias=moe.bias), FLOAT32, "router")
        if moe.router == "softmax":
            scores = f.softmax(logits, "router")
        else:
            scores = f.pointwise(logits, "router", "sigmoid", saves="result")
        choice = (logits if moe.router == "sigmoid" else scores).detach()
        del logits
        if moe.router == "sigmoid-groups":
            choice = aten.elementwise("add.Tensor", "router", choice, itemsize=FLOAT32)
        if moe.n_group > 1:
            choice = self._within_best_groups(moe, choice)
        values = aten.new("topk", "routing", few, FLOAT32, reads=(choice,))
        picks = aten.new("topk", "routing", few, INT64)
        del values, choice
        weights = f.gather(scores, picks, "routing weights")
        del scores
        if moe.norm_topk_prob:
            total = f.shift(f.sum(weights, "routing"), "routing")
            weights = f.divide(weights, total, "routing weights")
            del total
        if moe.routed_scaling_factor != 1.0:
            weights = f.scale(weights, "routing weights")
        return f.cast(weights, self.b, "routing weights"), picks

    def _within_best_groups(self, moe: MoE, choice: Tensor) -> Tensor:
        """within_best_groups()."""
        aten, groups = self.aten, ((B, T), (moe.n_group,))
        judged, kept = (*groups, (moe.group_best,)), (groups[0], (moe.topk_group,))
        values = aten.new("topk", "routing", judged, FLOAT32, reads=(choice,))
        places = aten.new("topk", "routing", judged, INT64)
        del places
        best = aten.new("sum.dim_IntList", "routing", groups, FLOAT32, reads=(values,))
        del values
        values = aten.new("topk", "routing", kept, FLOAT32, reads=(best,))
        places = aten.new("topk", "routing", kept, INT64)
        del values
        hidden = aten.new("ones_like", "routing", groups, BOOL)
        out = aten.elementwise("masked_fill.Scalar", "routing", choice)
        del best, places, hidden
        return out

    def _experts(self, moe: MoE, x: Tensor, weights: Tensor, picks: Tensor) -> Tensor:
        """Experts.forward."""
        f, aten, i = self.f, self.aten, moe.moe_intermediate_size
        E, k, width = moe.num_experts, moe.num_experts_per_tok, x.sizes[-1]
        rows: Dims = ((B, T, k),)
        of_row = aten.new("sort.stable", "routing", rows, INT64, reads=(picks,))
        order = aten.new("sort.stable", "routing", rows, INT64)
        counted = aten.new("arange", "routing", ((E,),), INT64)
        ends = aten.new("searchsorted.Tensor", "routing", ((E,),), INT32, reads=(of_row,))
        del counted
        token = aten.new("floor_divide", "routing", rows, INT64)
        x = f.index(x, token, rows, "routed tokens")
        del token
        if moe.router == "sigmoid":
            column = f.view(weights, (*rows, ONE))
            x = f.mul(x, f.index(column, order, rows, "routing weights"), "weighed tokens")
            del column
        if moe.layout == "flat":
            gate = self._linear(moe, x, "gate_proj", i, of_row, ends)
            gate = self._activate(moe.activation, gate)
            x = f.mul(gate, self._linear(moe, x, "up_proj", i, of_row, ends), "experts gate · up")
            del gate
        else:
            name, wide = ("gate_up_proj", 2 * i) if moe.gated else ("up_proj", i)
            x = self._linear(moe, x, name, wide, of_row, ends)
            x = self._gate(moe, x)
        x = self._linear(moe, x, "down_proj", width, of_row, ends)
        del of_row, ends
        place = aten.new("arange", "routing", rows, INT64)
        back = aten.new("empty_like", "routing", rows, INT64)
        x = f.index(x, back, rows, "experts by token")
        del back, order, place
        x = f.view(x, ((B, T), (k,), (width,)))
        if moe.router != "sigmoid":
            x = f.mul(x, f.view(weights, ((B, T), (k,), ONE)), "weighed experts")
        return f.sum_of(x, "experts output")

    def _gate(self, moe: MoE, x: Tensor) -> Tensor:
        """Experts._activate."""
        f, name, i = self.f, "experts gate · up", moe.moe_intermediate_size
        if not moe.gated:
            return self._activate(moe.activation, x)
        if moe.swiglu_alpha is None:
            gate, up = f.split(x, (i, i))
        else:
            gate, up = f.every_second(x), f.every_second(x)
        if moe.swiglu_limit is not None:
            gate, up = f.clamp(gate, "clamped gate", low=False), f.clamp(up, "clamped up")
        if moe.swiglu_alpha is None:
            return f.mul(self._activate(moe.activation, gate), up, name)
        slope = f.pointwise(f.scale(gate, name), name, "sigmoid", saves="result")
        glu = f.mul(gate, slope, name)
        del slope
        return f.mul(glu, f.shift(up, name), name)

    def _linear(
        self, moe: MoE, x: Tensor, name: str, out: int, of_row: Tensor, ends: Tensor
    ) -> Tensor:
        """Experts._linear by grouped_mm."""
        f, E, into = self.f, moe.num_experts, x.sizes[-1]
        k, i, turned = moe.num_experts_per_tok, moe.moe_intermediate_size, moe.layout == "grouped"
        match moe.layout:
            case "flat":
                width = into if name != "down_proj" else out
                weight = f.view(
                    self.weight(f"experts.{name}", E * i, width), ((E,), (i,), (width,))
                )
                turned = name != "down_proj"
            case "transposed":
                weight = self.weight(f"experts.{name}", E, into, out)
            case _:
                weight = self.weight(f"experts.{name}", E, out, into)
        if turned:
            weight = f.transpose(weight, 1, 2)
        reached = Reached(E, k)
        read = (reached, out * into * self.b)
        made = f.grouped_mm(x, weight, ends, f"experts {name}", read=read)
        if not moe.bias:
            return made
        bias = f.index(
            self.weight(f"experts.{name}_bias", E, out), of_row, x.dims[:1], "experts' bias"
        )
        return f.add(made, bias, "experts with bias")
