"""Parts that full training leaves as they are: `requires_grad_(False)` on their parameters.

They have no gradient, no state and no master copy. What autograd records follows from the rest: a
frozen layer with something trained before it still passes a gradient on, and saves what that takes;
one with nothing trained before it records nothing. Checkpointing in transformers asks the input
embeddings for a gradient (PreTrainedModel.enable_input_require_grads), so that it flows through all
layers whatever is frozen. A tied head is one tensor with the table: frozen with either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planner.errors import ConfigError
from planner.model import Model
from planner.tensors import Parameter
from planner.workload import Training

TABLE = "embed_tokens"


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenParts:
    """Some of workload.FROZEN_PARTS, and the first so many `layers`."""

    names: tuple[str, ...] = ()
    layers: int = 0

    def __bool__(self) -> bool:
        return bool(self.names or self.layers)

    def has_layer(self, index: int) -> bool:
        """Whether the block is one of them."""
        return index < self.layers

    def has_outer(self, name: str, *, tied: bool) -> bool:
        """Whether a parameter outside the blocks is among them; `tied`: the table is the head.

        "embeddings": all that stands before the first layer, tables, their norm and what leads from
        them to the model's width (OPT's project_in). "head": lm_head with its bias.
        """
        if "embeddings" in self.names and ("embed" in name or name.startswith("project_in")):
            return True
        head = name.startswith("lm_head") or (tied and name.startswith(TABLE))
        return "head" in self.names and head


NOTHING = FrozenParts()


def frozen_parts(work: Training) -> FrozenParts:
    """What the step leaves as it is."""
    return FrozenParts(names=work.frozen, layers=work.frozen_layers)


def unfrozen(parameters: Iterable[Parameter], model: Model, frozen: FrozenParts) -> list[Parameter]:
    """Those of the model that are trained."""
    tied = model.tie_word_embeddings

    def stays(p: Parameter) -> bool:
        if p.layer is not None:
            return frozen.has_layer(p.layer)
        return frozen.has_outer(p.name, tied=tied)

    return [p for p in parameters if not stays(p)]


def check_frozen_parts(model: Model, work: Training) -> None:
    """ConfigError for more layers than there are, and where nothing is left to train."""
    layers = len(model.layers)
    if work.frozen_layers > layers:
        raise ConfigError(
            f"frozen_layers={work.frozen_layers} is not allowed: 0 to {layers}, the layers of "
            f"{model.name}"
        )
    if not unfrozen(model.parameters(), model, frozen_parts(work)):
        raise ConfigError(
            f"frozen={work.frozen!r} with frozen_layers={work.frozen_layers} leaves nothing of "
            f"{model.name} to train: fewer"
        )
