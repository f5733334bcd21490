"""Ways out of a plan that does not fit: one change if that is enough, else more GPUs, or two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import combinations
from typing import Any

from planner.capacity.answers import changes
from planner.capacity.limits import smallest_layout
from planner.errors import ConfigError
from planner.estimate import estimate
from planner.model import Model
from planner.result import Estimate
from planner.workload import Deployment, Inference, LoRA, Training


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A change in words, the fields that it sets, and the estimate with it."""

    change: str
    sets: dict[str, Any]
    estimate: Estimate


def ways_to_fit(
    model: Model,
    work: Inference | Training,
    deploy: Deployment,
    *,
    only: frozenset[str] | None = None,
) -> tuple[Way, ...]:
    """Single changes after which the work fits, the most room first; if none does, the fewest GPUs
    that hold it; else pairs of changes.

    The sizes of the work stay as they are. `only`: fields of work and deployment that may be set.
    """
    single = list(_changes(work, deploy))
    pairs = (
        (f"{a} and {b}", first | second)
        for (a, first), (b, second) in combinations(single, 2)
        if not first.keys() & second.keys()
    )
    for tried in (single, _layouts(model, work, deploy), pairs):  # none before it is needed
        found = [
            way
            for change, sets in tried
            if only is None or only.issuperset(sets)
            if (way := _way(model, work, deploy, change, sets))
        ]
        if found:
            return tuple(sorted(found, key=lambda way: -way.estimate.headroom_bytes))
    return ()


def _layouts(
    model: Model, work: Inference | Training, deploy: Deployment
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fewest GPUs that hold it, where the runtime spreads a model over several."""
    try:
        found = smallest_layout(model, work, deploy)
    except ConfigError:
        return
    if found is None or found.world_size == 1:
        return
    if found.data_parallel_shards > 1:
        shards = found.data_parallel_shards
        yield f"{shards} GPUs", {"data_parallel_shards": shards}
    else:
        tp, pp = found.tensor_parallel, found.pipeline_parallel
        stages = f" in {pp} stages" if pp > 1 else ""
        sets = {"tensor_parallel": tp, "pipeline_parallel": pp}
        yield f"{found.world_size} GPUs{stages}", sets


def _changes(
    work: Inference | Training, deploy: Deployment
) -> Iterator[tuple[str, dict[str, Any]]]:
    names = [f.name for f in fields(Deployment) if f.name != "gpus"]
    for change, other in changes(deploy):
        differing = {name: getattr(other, name) for name in names}
        yield change, {k: v for k, v in differing.items() if v != getattr(deploy, k)}
    if isinstance(work, Inference):
        if work.logits == "all":
            yield "the last token's logits alone", {"logits": "last"}
        return
    if work.checkpointing != "full":
        yield "full checkpointing", {"checkpointing": "full"}
    if work.method == "full":
        yield "LoRA", {"method": "lora", "lora": LoRA()}
        if work.optimizer == "adamw":
            yield "8-bit AdamW", {"optimizer": "adamw-8bit"}
    if work.method in ("full", "lora"):
        lora = work.lora or LoRA()
        yield "QLoRA", {"method": "qlora", "lora": lora, "weight_dtype": "nf4"}


def _way(
    model: Model,
    work: Inference | Training,
    deploy: Deployment,
    change: str,
    sets: dict[str, Any],
) -> Way | None:
    """The way, if it is one; what a runtime refuses is none."""
    of_work = {f.name for f in fields(work)}
    try:
        e = estimate(
            model,
            replace(work, **{k: v for k, v in sets.items() if k in of_work}),
            replace(deploy, gpus=1, **{k: v for k, v in sets.items() if k not in of_work}),
        )
    except ConfigError:
        return None
    return Way(change=change, sets=sets, estimate=e) if e.fits else None
