"""How evenly a router spreads tokens: tokens of each expert of each layer, counted while asked for.

A GPU waits for its fullest expert, so what the slowest of E experts holds over the mean is what an
uneven router costs. Nothing is counted, and no op is added, outside of `expert_loads`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from attnlab.routers import Gate
from attnlab.transformer import Transformer


@dataclass(frozen=True, slots=True)
class ExpertLoads:
    """Of all passes while it was open: `tokens[layer]`, int64 [E], on the transformer's device.

    A token counts once for each of its experts; padding counts, for it is computed. A block that
    checkpointing runs again counts again.
    """

    tokens: dict[int, Tensor] = field(default_factory=dict)

    dropped = 0
    """Tokens that an expert had no room for: none, experts here take all that come."""

    @property
    def imbalance(self) -> dict[int, float]:
        """Tokens of the fullest expert over the mean, by layer: 1 is even, E / k the worst."""
        return {i: (n.max() / n.double().mean()).item() for i, n in self.tokens.items()}


@contextmanager
def expert_loads(transformer: Transformer) -> Iterator[ExpertLoads]:
    """Counts what the routers pick, layer by layer, until it closes; dense layers are left out."""
    loads = ExpertLoads()

    def counting(layer: int) -> object:
        def count(gate: nn.Module, _: object, out: tuple[Tensor, Tensor]) -> None:
            picks = out[1].flatten()
            held = loads.tokens.setdefault(
                layer, torch.zeros(gate.moe.num_experts, dtype=torch.long, device=picks.device)
            )
            held.scatter_add_(0, picks, torch.ones_like(picks))  # bincount would wait for the GPU

        return count

    with ExitStack() as stack:
        for layer, block in enumerate(transformer.layers):
            gate = getattr(getattr(block, "mlp", None), "gate", None)
            if isinstance(gate, Gate):
                stack.enter_context(gate.register_forward_hook(counting(layer)))
        yield loads
