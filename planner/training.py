"""Which runtimes plan training, and what a training step holds besides weights and activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.activations import Peak
from planner.errors import ConfigError
from planner.kbit import check_frozen
from planner.ledger import Row, total_bytes
from planner.lora import adapter_bytes, adapters
from planner.model import Model
from planner.runtimes.attnlab_training.step import training_phase as attnlab
from planner.runtimes.base import Phase, Setting
from planner.runtimes.transformers_training import training_phase as transformers
from planner.runtimes.writer import FLOAT32
from planner.workload import Deployment, Training

PLANNED: dict[str, Callable[[Model, Training, Setting], Phase]] = {
    "attnlab": attnlab,
    "transformers": transformers,
}
"""Runtimes that have a program of a training step."""


def training_phase(model: Model, work: Training, deploy: Deployment, setting: Setting) -> Phase:
    """The step's program and its sizes; ConfigError for what is not planned."""
    if deploy.runtime not in PLANNED:
        raise ConfigError(
            f"runtime={deploy.runtime} does not plan training yet: {', '.join(PLANNED)}"
        )
    for field in ("kv_dtype", "cache"):
        if getattr(deploy, field) is not None:
            raise ConfigError(f"{field}={getattr(deploy, field)!r} is not allowed: None (training)")
    check_frozen(model, work, deploy, setting)
    limit = model.max_position_embeddings
    if limit is not None and work.sequence_tokens > limit:
        raise ConfigError(
            f"sequence_tokens={work.sequence_tokens} reaches beyond "
            f"max_position_embeddings={limit} of {model.name}"
        )
    return PLANNED[deploy.runtime](model, work, setting)


def adapter_rows(model: Model, work: Training) -> list[Row]:
    """The adapters beside the weights, where nothing else is trained."""
    lora = work.adapters
    if lora is None:
        return []
    trained, b = adapters(model, lora), adapter_bytes(lora)
    elements = sum(p.count for p in trained)
    return [
        Row(
            component="weights",
            item=f"adapters of rank {lora.rank}, {len(trained)} tensors",
            count=1,
            formula="parameters · b",
            values=(("parameters", elements), ("b", b)),
            size_bytes=elements * b,
        )
    ]


def gradient_rows(weights: list[Row], work: Training) -> list[Row]:
    """A gradient for each parameter, in its dtype: the rows of the weights without buffers.

    Of master weights those of the copies, which the weights' own make room for.
    """
    rows = [
        replace(row, component="gradients")
        for row in weights
        if dict(row.values).keys() >= {"parameters"}
    ]
    return [_of_copies(row) for row in rows] if work.steps_copies else rows


def _of_copies(row: Row) -> Row:
    elements = dict(row.values)["parameters"]
    return replace(
        row,
        values=(("parameters", elements), ("b", FLOAT32)),
        size_bytes=elements * FLOAT32,
        note="of the master weights",
    )


def unfinished_row(highest: Peak, gradients: list[Row]) -> list[Row]:
    """What the gradients still lack when the peak is reached; nothing where all are there."""
    finished = total_bytes(gradients)
    if highest.gradients_bytes == finished:
        return []
    return [
        Row(
            component="activations",
            item="gradients at the peak, short of all of them",
            count=1,
            formula="held − all",
            values=(("held", highest.gradients_bytes), ("all", finished)),
            size_bytes=highest.gradients_bytes - finished,
            note="the backward makes them layer by layer",
        )
    ]
