"""Inverse questions with their reasons: a number, what ends it, and what would move the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from planner.capacity.concurrency import concurrent_requests
from planner.capacity.limits import max_batch, max_context_tokens, smallest_layout
from planner.capacity.traffic import Traffic
from planner.catalog.gpus import gpu_named, gpus
from planner.errors import ConfigError, check_kind
from planner.estimate import estimate
from planner.format import gib
from planner.loading import catalogue, load_model
from planner.model import Model
from planner.result import Estimate
from planner.runtimes import runtime_named
from planner.workload import Deployment, Inference, Training

if TYPE_CHECKING:
    import pandas as pd

Work = Inference | Training

CLEARLY_LARGER = 1.25
"""Times the memory of a GPU that is worth naming instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Relief:
    """A change, and the answer with it."""

    change: str
    value: int
    gain: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """`value` in `unit`; `binding`: what one more would break; `reliefs`, the largest gain first.

    `near_the_limit`: torch's allocator, simulated, would not serve the answer from its segments.
    """

    question: str
    value: int
    unit: str
    binding: str
    reliefs: tuple[Relief, ...]
    near_the_limit: bool = False

    @property
    def in_words(self) -> str:
        """The answer in lines: first the number, then what would relax it."""
        lines = [f"{self.question}: {self.value:,} {self.unit} (ends at: {self.binding})"]
        lines += [f"  {r.change}: {r.value:,} ({r.gain:+,})" for r in self.reliefs]
        if self.near_the_limit:
            lines.append("  the parts fit, torch's segments may not: see `planner estimate`")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON types."""
        return asdict(self)


def longest_context(model: Model, work: Work, deploy: Deployment) -> Answer:
    """`max_context_tokens` with its reasons."""

    def longer(tokens: int) -> Work:
        if isinstance(work, Training):
            return replace(work, sequence_tokens=tokens)
        return replace(work, prompt_tokens=tokens - work.output_tokens + 1)

    def ask(model: Model, work: Work, deploy: Deployment) -> int:
        return max_context_tokens(model, work, deploy)

    least = 1 if isinstance(work, Training) else work.output_tokens
    return _answer(
        f"longest context at batch {work.batch}", "tokens", ask, longer, least, model, work, deploy
    )


def largest_batch(model: Model, work: Work, deploy: Deployment) -> Answer:
    """`max_batch` with its reasons."""
    lengths = "sequence_tokens" if isinstance(work, Training) else "prompt_tokens"
    return _answer(
        f"largest batch at {getattr(work, lengths):,} {lengths.replace('_', ' ')}",
        "sequences",
        max_batch,
        lambda batch: replace(work, batch=batch),
        1,
        model,
        work,
        deploy,
    )


def most_requests(
    model: Model, traffic: Traffic, deploy: Deployment, *, probability: float = 0.99
) -> Answer:
    """`max_concurrent_requests` with its reasons."""

    def ask(deploy: Deployment) -> int:
        return concurrent_requests(model, traffic, deploy, probability=probability).requests

    found = concurrent_requests(model, traffic, deploy, probability=probability)
    return Answer(
        question=f"requests at once, {traffic.in_words}",
        value=found.requests,
        unit=f"requests in {probability:.0%} of moments",
        binding=found.binding,
        reliefs=_reliefs(found.requests, ((c, lambda d=d: ask(d)) for c, d in changes(deploy))),
    )


def _answer(
    question: str,
    unit: str,
    ask: Callable[[Model, Work, Deployment], int],
    larger: Callable[[int], Work],
    least: int,
    model: Model,
    work: Work,
    deploy: Deployment,
) -> Answer:
    value = ask(model, work, deploy)
    others: list[tuple[str, Callable[[], int]]] = [
        (change, lambda d=d: ask(model, work, d))  # type: ignore[misc]
        for change, d in changes(deploy)
    ]
    if isinstance(work, Inference) and work.logits == "all":
        last = replace(work, logits="last")
        others.append(("the last token's logits alone", lambda: ask(model, last, deploy)))
    if isinstance(work, Training) and work.checkpointing == "none":
        again = replace(work, checkpointing="full")
        others.append(("full checkpointing", lambda: ask(model, again, deploy)))
    return Answer(
        question=question,
        value=value,
        unit=unit,
        binding=_binding(model, larger(max(value + 1, least)), deploy),
        reliefs=_reliefs(value, others),
        near_the_limit=_segments_fail(model, larger(value), deploy) if value else False,
    )


def _binding(model: Model, work: Work, deploy: Deployment) -> str:
    """What the first workload that does not fit breaks."""
    try:
        e = estimate(model, work, deploy)
    except ConfigError as error:
        limit = model.max_position_embeddings
        if limit is not None and "max_position_embeddings" in str(error):
            return f"the model's {limit:,} positions"
        return str(error)
    if e.fits:  # a number further down is the first that does not fit
        return "a smaller size that needs more blocks"
    return binding_of(e)


def binding_of(e: Estimate) -> str:
    """Why an estimate does not fit: what is missing, and the largest part of it."""
    m = e.memory
    if e.pool is not None:
        if e.pool.available_bytes <= 0:
            return "weights and the profile run leave no KV pool"
        if e.headroom_bytes < 0:
            return f"the KV pool of {gib(e.pool.size_bytes)}"
        return f"max_sequences={e.setting.max_sequences:,}"
    parts = {
        "weights": m.weights_bytes,
        "KV cache": m.kv_cache_bytes,
        "activations": m.activations_bytes,
        "gradients": m.gradients_bytes,
        "optimizer states": m.optimizer_bytes,
    }
    most = max(parts, key=lambda name: parts[name])
    return f"the {gib(e.gpu.memory_bytes)} of {e.gpu.label}, most of it {most}"


def _segments_fail(model: Model, work: Work, deploy: Deployment) -> bool:
    played = estimate(model, work, deploy).allocator()
    return played is not None and played.oom is not None


def changes(deploy: Deployment) -> Iterator[tuple[str, Deployment]]:
    """Deployments that differ in one thing which may leave more room."""
    runtime = runtime_named(deploy.runtime)
    for kv_dtype in ("fp8", "int8", "int4"):
        if kv_dtype in runtime.kv_dtypes and kv_dtype != deploy.kv_dtype:
            yield f"{kv_dtype} KV", replace(deploy, kv_dtype=kv_dtype)
    for weight_dtype in ("fp8", "int8", "nf4"):
        if weight_dtype != deploy.weight_dtype and deploy.data_parallel_shards == 1:
            yield f"{weight_dtype} weights", replace(deploy, weight_dtype=weight_dtype)
    if deploy.runtime == "vllm":
        doubled = 2 * deploy.tensor_parallel
        yield (
            f"tensor_parallel={doubled}",
            replace(deploy, tensor_parallel=doubled, gpus=1),
        )
        if deploy.memory_utilization < 0.95:
            yield "memory_utilization=0.95", replace(deploy, memory_utilization=0.95)
    now = gpu_named(deploy.gpu)
    larger = [
        g
        for g in gpus().values()
        if g.vendor == now.vendor and g.memory_bytes > CLEARLY_LARGER * now.memory_bytes
    ]
    if larger:
        gpu = min(larger, key=lambda g: g.memory_bytes)
        yield f"on {gpu.name}", replace(deploy, gpu=gpu.name)


def _reliefs(value: int, others: Iterator[Any] | Sequence[Any]) -> tuple[Relief, ...]:
    """Those that gain something; what a runtime refuses is no way out."""
    found = []
    for change, ask in others:
        try:
            other = ask()
        except ConfigError:
            continue
        if other > value:
            found.append(Relief(change=change, value=other, gain=other - value))
    return tuple(sorted(found, key=lambda relief: -relief.gain))


def gpu_ladder(
    model: Model,
    work: Work,
    deploy: Deployment,
    *,
    names: Sequence[str] | None = None,
    price_per_hour: dict[str, float] | None = None,
) -> pd.DataFrame:
    """For each GPU the fewest that hold one copy: gpus, layout, headroom, price where it is known.

    Sorted by price where all that fit have one, else by the memory bought. A GPU that cannot has
    gpus missing and the reason.
    """
    import pandas as pd

    if names is not None:
        check_kind("names", names, Iterable)
    if price_per_hour is not None:
        check_kind("price_per_hour", price_per_hour, Mapping)
    prices = price_per_hour or {}
    rows = [_rung(model, work, deploy, name, prices.get(name)) for name in names or gpus()]
    table = pd.DataFrame(rows)
    table["gpus"] = table["gpus"].astype("Int64")
    fitting = table[table["gpus"].notna()]
    priced = bool(len(fitting)) and bool(fitting["price_per_hour"].notna().all())
    order = ["price_per_hour"] if priced else ["bought_memory_bytes"]
    return table.sort_values([*order, "gpus"], kind="stable", ignore_index=True)


def _rung(
    model: Model, work: Work, deploy: Deployment, gpu: str, price: float | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "gpu": gpu,
        "gpus": None,
        "tensor_parallel": None,
        "pipeline_parallel": None,
        "bought_memory_bytes": None,
        "headroom_bytes": None,
        "price_per_hour": None,
        "why_not": "",
    }
    here = replace(deploy, gpu=gpu, tensor_parallel=1, pipeline_parallel=1, gpus=1)
    try:
        found = smallest_layout(model, work, here)
    except ConfigError as error:
        return row | {"why_not": str(error)}
    if found is None:
        return row | {"why_not": binding_of(estimate(model, work, here))}
    n = found.world_size
    return row | {
        "gpus": n,
        "tensor_parallel": found.tensor_parallel,
        "pipeline_parallel": found.pipeline_parallel,
        "bought_memory_bytes": n * gpu_named(gpu).memory_bytes,
        "headroom_bytes": estimate(model, work, found).headroom_bytes,
        "price_per_hour": None if price is None else n * price,
    }


def cheapest_gpu(
    model: Model,
    work: Work,
    deploy: Deployment,
    *,
    names: Sequence[str] | None = None,
    price_per_hour: dict[str, float] | None = None,
) -> str | None:
    """The first of `gpu_ladder` that fits; None where none does."""
    table = gpu_ladder(model, work, deploy, names=names, price_per_hour=price_per_hour)
    fitting = table[table["gpus"].notna()]
    return None if fitting.empty else str(fitting["gpu"].iloc[0])


def largest_model(
    work: Work, deploy: Deployment, *, models: Sequence[str | Model] | None = None
) -> str | None:
    """The model with the most parameters that fits, of those given or of the catalogue."""
    if models is not None:
        check_kind("models", models, Iterable)
    found: list[tuple[int, str]] = []
    for source in models if models is not None else catalogue():
        model = source if isinstance(source, Model) else load_model(source)
        try:
            if estimate(model, work, deploy).fits:
                found.append((model.parameter_count, model.name))
        except ConfigError:
            continue
    return max(found)[1] if found else None


def what_if(before: Estimate, after: Estimate) -> pd.DataFrame:
    """Where two estimates differ: component, item, before_bytes, after_bytes, change_bytes.

    A row for each item that changed, then one for each component, then the total; the changes of
    the items of a component sum to the component's, and those to the total's.
    """
    import pandas as pd

    check_kind("before", before, Estimate)
    check_kind("after", after, Estimate)
    sizes: list[dict[tuple[str, str], int]] = []
    for e in (before, after):
        items: dict[tuple[str, str], int] = {}
        for row in e.rows:
            key = (row.component, row.item)
            items[key] = items.get(key, 0) + row.size_bytes
        sizes.append(items)
    keys = list(dict.fromkeys([*sizes[0], *sizes[1]]))
    rows = []
    for component in dict.fromkeys(component for component, _ in keys):
        mine = [key for key in keys if key[0] == component]
        pairs = [(key[1], sizes[0].get(key, 0), sizes[1].get(key, 0)) for key in mine]
        rows += [(component, item, a, b, b - a) for item, a, b in pairs if a != b]
        a, b = sum(pair[1] for pair in pairs), sum(pair[2] for pair in pairs)
        rows.append((component, "in all", a, b, b - a))
    a, b = before.memory.total_bytes, after.memory.total_bytes
    rows.append(("total", "in all", a, b, b - a))
    columns = ["component", "item", "before_bytes", "after_bytes", "change_bytes"]
    return pd.DataFrame(rows, columns=columns)
