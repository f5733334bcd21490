"""One training step: cross-entropy of the next tokens in float32, backward, optimizer.

What it holds at its peak, besides weights and optimizer states: gradients, activations, logits.
Each has its lever here: adapters (lora.py) leave few gradients; checkpointing.py drops activations
and computes them again; chunked_loss.py never makes the logits; fewer sequences at a time, whose
gradients are added up, divide the last two; autocast computes float32 weights in bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from attnlab.checkpointing import Checkpointing
from attnlab.chunked_loss import IGNORED, chunked_loss
from attnlab.transformer import Transformer
from planner.errors import ConfigError, check_choice, check_size

Precision = Literal["pure", "autocast"]


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood of each position's next token, in float32."""
    logits = logits_BTV.float().flatten(0, 1)
    del logits_BTV
    return cross_entropy(logits, labels_BT.flatten(), ignore_index=IGNORED)


def loss_of(
    transformer: Transformer,
    ids: Tensor,
    labels: Tensor,
    *,
    loss_chunk_tokens: int | None = None,
    **how: Any,
) -> Tensor:
    """The loss of a forward, its way back still open; `how` is what the forward takes."""
    if loss_chunk_tokens is None:
        return next_token_loss(transformer(ids, **how), labels)
    return chunked_loss(
        transformer(ids, logits="none", **how),
        *transformer.head,
        labels,
        chunk_tokens=loss_chunk_tokens,
        model=transformer.model,
        logits_bias=getattr(transformer, "final_logits_bias", None),
    )


def training_step(
    transformer: Transformer,
    ids: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    encoder_inputs: Tensor | None = None,
    encoder_tokens: Sequence[int] | None = None,
    checkpointing: Checkpointing = "none",
    checkpoint_every: int = 1,
    precision: Precision = "pure",
    loss_chunk_tokens: int | None = None,
    accumulation_steps: int = 1,
) -> Tensor:
    """The loss of token ids [B, T] against labels [B, T], the token after each.

    Gradients lie in `.grad`; with an optimizer they are used up and gone. The encoder's part is
    what an EncoderDecoder takes. `checkpointing` "full": every `checkpoint_every`-th block, the
    first one included, runs again on the way back instead of keeping its inside; "selective": all
    do, but for their matrix products and fused attention. `precision` "autocast": what is trained
    is float32, torch.autocast to bfloat16 around the forward. `loss_chunk_tokens`: head and
    cross-entropy of so many tokens at a time. `accumulation_steps`: the sequences in so many equal
    parts one after the other; the loss stays the mean over all real labels. Raises ConfigError for
    what is not allowed, before anything is computed.
    """
    check_size("accumulation_steps", accumulation_steps)
    if loss_chunk_tokens is not None:
        check_size("loss_chunk_tokens", loss_chunk_tokens)
    region = _region(transformer, precision)
    how = dict(
        checkpointing=checkpointing,
        checkpoint_every=checkpoint_every,
        loss_chunk_tokens=loss_chunk_tokens,
    )
    real = (labels != IGNORED).sum() if accumulation_steps > 1 else None
    losses = []
    given = (ids, labels, encoder_inputs, encoder_tokens)
    for part, part_labels, encoder in _parts(accumulation_steps, *given):
        with region:
            loss = loss_of(transformer, part, part_labels, **encoder, **how)
        if real is not None:
            loss = loss * ((part_labels != IGNORED).sum() / real)
        loss.backward()
        losses.append(loss.detach())
        del loss
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return losses[0] if real is None else torch.stack(losses).sum()


def _region(transformer: Transformer, precision: str) -> AbstractContextManager[object]:
    """Where autocast is on; ConfigError where it would train weights that are not float32."""
    check_choice("precision", precision, ("pure", "autocast"))
    if precision == "pure":
        return nullcontext()
    trained = {p.dtype for p in transformer.parameters() if p.requires_grad}
    for dtype in trained - {torch.float32}:
        raise ConfigError(
            f"precision=autocast is not allowed with weights of {dtype} to train: torch.float32"
        )
    return torch.autocast(transformer.device.type, torch.bfloat16)


def _parts(
    steps: int,
    ids: Tensor,
    labels: Tensor,
    encoder_inputs: Tensor | None,
    encoder_tokens: Sequence[int] | None,
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Ids, labels and what the encoder gets of each part; ConfigError where they are not equal."""
    B = len(ids)
    if B % steps:
        raise ConfigError(
            f"accumulation_steps={steps} is not allowed with {B} sequences: a divisor of {B}"
        )
    for start in range(0, B, B // steps):
        rows, encoder = slice(start, start + B // steps), {}
        if encoder_inputs is not None:
            encoder["encoder_inputs"] = encoder_inputs[rows]
        if encoder_tokens is not None:
            encoder["encoder_tokens"] = encoder_tokens[rows]
        yield ids[rows], labels[rows], encoder
