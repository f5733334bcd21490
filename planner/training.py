"""Which runtimes plan training, and what a training step holds besides weights and activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from planner.activations import Peak
from planner.dtypes import element_bytes
from planner.errors import ConfigError
from planner.kbit import check_frozen
from planner.ledger import Component, Row, total_bytes
from planner.model import Model
from planner.runtimes.attnlab_training.step import training_phase as attnlab
from planner.runtimes.base import Phase, Setting
from planner.runtimes.litgpt_finetuning import as_kept
from planner.runtimes.litgpt_finetuning import training_phase as litgpt
from planner.runtimes.litgpt_training.model import as_litgpt
from planner.runtimes.torchtune_training import as_torchtune
from planner.runtimes.torchtune_training import training_phase as torchtune
from planner.runtimes.transformers_training import training_phase as transformers
from planner.runtimes.writer import FLOAT32
from planner.tensors import Parameter
from planner.trained.lora import adapter_bytes, adapters
from planner.trained.optimizers import trainable
from planner.trained.prefix_adapters import METHODS as PREFIXES
from planner.trained.prefix_adapters import kept_rows, prefix_adapters
from planner.workload import Deployment, Training

PLANNED: dict[str, Callable[[Model, Training, Setting], Phase]] = {
    "attnlab": attnlab,
    "transformers": transformers,
    "litgpt": litgpt,
    "torchtune": torchtune,
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
    if deploy.runtime != "litgpt":  # which has rules of its own
        check_frozen(model, work, deploy, setting)
    check_length(model, work)
    return PLANNED[deploy.runtime](model, work, setting)


def check_length(model: Model, work: Training) -> None:
    """ConfigError for sequences beyond the model's positions."""
    limit = model.max_position_embeddings
    if limit is not None and work.sequence_tokens > limit:
        raise ConfigError(
            f"sequence_tokens={work.sequence_tokens} reaches beyond "
            f"max_position_embeddings={limit} of {model.name}"
        )


def as_built(model: Model, work: Training, deploy: Deployment) -> tuple[Model, Training]:
    """Model and workload as the runtime's own classes have them, where they are not the config's.

    Of lit-gpt and torchtune: other tensors, tables of the longest sample, adapters in the model's
    dtype.
    """
    if deploy.runtime not in ("litgpt", "torchtune"):
        return model, work
    check_length(model, work)
    work = as_kept(work, deploy.dtype or model.dtype, deploy.runtime)
    if deploy.runtime == "torchtune":
        return as_torchtune(model), work
    return as_litgpt(model, work.sequence_tokens), work


def adapter_rows(model: Model, work: Training, dtype: str) -> list[Row]:
    """The adapters beside the weights, those of LLaMA-Adapter in `dtype`."""
    lora = work.adapters
    if lora is not None:
        item = f"adapters of rank {lora.rank}"
        return [_added_row(item, adapters(model, lora), adapter_bytes(lora))]
    if work.method in PREFIXES:
        b = element_bytes(dtype)
        beside = prefix_adapters(model, work.method)
        return [_added_row("LLaMA-Adapter's", beside, b), *kept_rows(model, b)]
    return []


def _added_row(item: str, added: list[Parameter], b: int, component: Component = "weights") -> Row:
    elements = sum(p.count for p in added)
    return Row(
        component=component,
        item=f"{item}, {len(added)} tensors",
        count=1,
        formula="parameters · b",
        values=(("parameters", elements), ("b", b)),
        size_bytes=elements * b,
    )


def gradient_rows(model: Model, work: Training, weights: list[Row], dtype: str) -> list[Row]:
    """A gradient for each parameter, in its dtype: the rows of the weights without buffers.

    Of master weights those of the copies, which the weights' own make room for.
    """
    if work.method in PREFIXES or work.freezes:
        b = element_bytes(work.held_dtype(dtype))
        item = "of what is not frozen" if work.freezes else "LLaMA-Adapter's"
        rows = [_added_row(item, trainable(model, work), b, "gradients")]
    else:
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
