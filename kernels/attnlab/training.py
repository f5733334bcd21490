"""One training step: cross-entropy of the next tokens in float32, backward, optimizer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnlab.transformer import Transformer

IGNORED = -100
"""The label of a position that counts for nothing, as in cross_entropy and transformers."""


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood of each position's next token, in float32."""
    logits = logits_BTV.float().flatten(0, 1)
    del logits_BTV
    return cross_entropy(logits, labels_BT.flatten(), ignore_index=IGNORED)


def training_step(
    transformer: Transformer,
    ids: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    checkpointing: Literal["none", "full"] = "none",
) -> Tensor:
    """The loss of token ids [B, T] against labels [B, T], the token after each.

    Gradients lie in `.grad`; with an optimizer they are used up and gone. `checkpointing`: "full"
    computes every block a second time on the way back instead of keeping its inside.
    """
    loss = next_token_loss(transformer(ids, checkpointing=checkpointing), labels)
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()
