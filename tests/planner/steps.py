"""A real training step of attnlab, watched storage by storage, and the program of the same step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

import planner
from attnlab.training import training_step
from attnlab.transformer import Transformer
from planner.program import Dims, Program
from planner.runtimes.attnlab_training.chunked_loss import in_chunks
from planner.runtimes.attnlab_training.regime import Regime, Step
from planner.runtimes.attnlab_training.step import step_program
from profiles.meters import LiveTensorMeter

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def watched_step(
    live: Transformer, batch: int, tokens: int, optimizer: Any = None, **how: Any
) -> Any:
    """The meter after one step; only the gradients are left."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(
        live.model.vocab_size, (2, batch, tokens), generator=generator
    ).unbind()
    with LiveTensorMeter(log=True) as meter:
        training_step(live, ids, labels, optimizer, **how)
    return meter


def program_of(model: planner.Model, dims: Dims, **what: Any) -> Program:
    """The step's program at this point."""
    program = step_program(model, Step(device="cpu", **what), Regime.of(model, dims))
    return in_chunks(program, what.get("loss_chunk_tokens"), dims)


def square(batch: int, tokens: int) -> Dims:
    """The sizes of a step."""
    return Dims(batch=batch, tokens=tokens, context=tokens)


def curve(events: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """(op, live bytes) after every allocation."""
    live, points = 0, []
    for op, change in events:
        live += change
        if change > 0:
            points.append((op, live))
    return points


def events(program: Program, dims: Dims) -> list[tuple[str, int]]:
    """(kernel, ± bytes) of the program, layers unrolled."""
    changes = []
    for segment in program.segments:
        for op in segment.ops * segment.count:
            changes += [(op.kernel, b.nbytes(dims)) for b in op.allocates]
            changes += [(op.kernel, -b.nbytes(dims)) for b in op.frees]
    return changes
