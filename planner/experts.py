"""Which mixtures a model has, and how many of their experts a workload's passes reach."""

from __future__ import annotations

from dataclasses import dataclass

from planner.layers import MoE
from planner.model import Model
from planner.routing import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsReached:
    """Layers with the same mixture, and the experts that one pass reaches in each, in expectation.

    None: there is no such pass. `fullest`: what the most popular expert is picked over the mean.
    """

    layers: int
    num_experts: int
    num_experts_per_tok: int
    fullest: float
    prefill_reached: float | None
    decode_reached: float | None
    step_reached: float | None

    @property
    def in_words(self) -> str:
        """What a pass reaches, in one line."""
        passes = (
            ("a prefill", self.prefill_reached),
            ("a decode step", self.decode_reached),
            ("a training step", self.step_reached),
        )
        told = [f"{name} reaches {count:.3g}" for name, count in passes if count is not None]
        if self.fullest > 1.0:
            told.append(f"the most popular is picked {self.fullest:.1f} × the mean")
        return f"of {self.num_experts} {', '.join(told)}"


def has_experts(model: Model) -> bool:
    """Whether some layer is a mixture."""
    return any(isinstance(layer.feed_forward, MoE) for layer in model.layer_kinds())


def experts_reached(
    model: Model,
    routing: Routing,
    *,
    prefill_tokens: float | None = None,
    decode_tokens: float | None = None,
    step_tokens: float | None = None,
) -> tuple[ExpertsReached, ...]:
    """For every kind of mixture, what passes of so many tokens reach; nothing of a dense model."""
    layers: dict[tuple[int, int], int] = {}
    for layer, count in model.layer_kinds().items():
        if isinstance(layer.feed_forward, MoE):
            kind = layer.feed_forward.num_experts, layer.feed_forward.num_experts_per_tok
            layers[kind] = layers.get(kind, 0) + count

    def reached(kind: tuple[int, int], tokens: float | None) -> float | None:
        return None if tokens is None else float(routing.reached(*kind, tokens))

    return tuple(
        ExpertsReached(
            layers=count,
            num_experts=kind[0],
            num_experts_per_tok=kind[1],
            fullest=1.0 if routing.balanced else routing.fullest(*kind),
            prefill_reached=reached(kind, prefill_tokens),
            decode_reached=reached(kind, decode_tokens),
            step_reached=reached(kind, step_tokens),
        )
        for kind, count in layers.items()
    )
