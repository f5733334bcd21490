"""Which blocks are computed a second time on the way back, and what they keep till then.

Kept of a block of B·T tokens until its gradient is made: all that its ops need (none), its input
alone, B·T·h (full), or that and what its matrix products and fused attention returned (selective).
The price is a second forward: of every `every`-th block, first one included; with selective of
all but the products, a few per cent of the FLOPs. What is computed twice is the same to the bit.
Batched products are not kept: naive attention's T² scores are such.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from planner.errors import ConfigError, check_choice, check_size

Checkpointing = Literal["none", "full", "selective"]

aten = torch.ops.aten
KEPT = [
    aten.mm.default,
    aten.addmm.default,
    aten._grouped_mm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
]
"""The ops whose outputs "selective" keeps."""

again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # no dropout here
again_but_products = partial(again, context_fn=partial(create_selective_checkpoint_contexts, KEPT))


def check_checkpointing(policy: str, every: int) -> None:
    """ConfigError for an unknown policy, and for a distance where all blocks run again or none."""
    check_choice("checkpointing", policy, get_args(Checkpointing))
    check_size("checkpoint_every", every)
    if every != 1 and policy != "full":
        raise ConfigError(
            f"checkpoint_every={every} is not allowed: 1 for checkpointing={policy!r}, any for "
            "'full'"
        )


def run(policy: Checkpointing, every: int, index: int) -> Callable[..., Tensor]:
    """How block `index` of the model is called: run(…)(block, *its arguments)."""
    if policy == "selective":
        return again_but_products
    return again if policy == "full" and index % every == 0 else _once


def _once(block: Callable[..., Tensor], *given: object) -> Tensor:
    return block(*given)
