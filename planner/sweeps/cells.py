"""The cells of a sweep: combinations of models, GPUs and settings, and their numbers.

One combination is prepared once; its batches × contexts are one broadcast evaluation of the rules
that `estimate` follows. What is refused keeps its rows, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from planner.catalog.gpus import gpu_named
from planner.dtypes import COMPUTE_DTYPES, KV_DTYPES
from planner.errors import MAX_SIZE, ConfigError, check_choice, check_size
from planner.estimate import estimate
from planner.loading import load_model
from planner.model import Model
from planner.prepared import Prepared, prepare
from planner.routing import UNIFORM, Routing
from planner.runtimes import runtime_named
from planner.sweeps.grid import Workloads, memory_grid, takes_arrays, time_grid
from planner.workload import Deployment, Inference

if TYPE_CHECKING:
    pass

CHUNK_CELLS = 1 << 17
"""Cells that are evaluated, and written to a file, at once."""

MAX_SINGLE_CELLS = 100_000
"""Cells of a combination whose rules take no arrays (transformers' quantised caches)."""

LABELS = (
    "model",
    "gpu",
    "runtime",
    "dtype",
    "kv_dtype",
    "tensor_parallel",
    "pipeline_parallel",
    "gpus",
)
SIZES = ("batch", "context_tokens", "output_tokens")
BYTES = (
    "weights_bytes",
    "kv_cache_bytes",
    "activations_bytes",
    "overhead_bytes",
    "total_bytes",
    "peak_live_bytes",
    "gpu_memory_bytes",
    "headroom_bytes",
    "kv_pool_bytes",
    "kv_pool_tokens",
)
TIMES = ("ttft_s", "tpot_s", "output_tokens_per_s")
Strings = Sequence[str | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """One setting of everything but batch and context."""

    model: Model
    deploy: Deployment | None
    labels: tuple[str, ...]
    refused: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Some cells of one combination: numbers by column, where they are known, and why not."""

    combination: Combination
    numbers: dict[str, NDArray[Any]]
    known: NDArray[np.bool_]
    refused: NDArray[Any]
    latency_basis: str = ""


def sizes(field: str, given: Iterable[int] | int) -> NDArray[np.int64]:
    """Whole numbers in the order given; ConfigError for one that is none, or for none at all."""
    values = [given] if not isinstance(given, Iterable) else list(given)
    if not values:
        raise ConfigError(f"{field} is empty: at least one number")
    plain = [int(v) if isinstance(v, np.integer) else v for v in values]
    least, most = (f(plain, default=1) if all(type(v) is int for v in plain) else None
                   for f in (min, max))  # fmt: skip
    if least is None or most is None or least < 1 or most > MAX_SIZE:
        for value in plain:
            check_size(field, value)
    return np.array(plain, dtype=np.int64)


def listed(given: Any) -> list[Any]:
    """One value, or several."""
    one = isinstance(given, str | bytes) or not isinstance(given, Iterable)
    return [given] if one else list(given)


def combinations(
    models: Iterable[str | Model] | str | Model,
    gpus: Iterable[str] | str,
    *,
    runtime: Sequence[str],
    dtype: Sequence[str | None],
    kv_dtype: Sequence[str | None],
    tensor_parallel: Sequence[int],
    pipeline_parallel: Sequence[int],
) -> list[Combination]:
    """The product of all settings; one that contradicts itself says why."""
    loaded = [m if isinstance(m, Model) else load_model(m) for m in listed(models)]
    settings = (listed(gpus), runtime, dtype, kv_dtype, tensor_parallel, pipeline_parallel)
    for field, values in zip(("gpus", *LABELS[2:7]), settings, strict=True):
        if not values:
            raise ConfigError(f"{field} is empty: at least one")
    if not loaded:
        raise ConfigError("models is empty: at least one")
    for name in settings[0]:
        gpu_named(name)
    for name in runtime:
        runtime_named(name)
    for field, values, allowed in (
        ("dtype", dtype, COMPUTE_DTYPES),
        ("kv_dtype", kv_dtype, KV_DTYPES),
    ):
        for value in values:
            if value is not None:
                check_choice(field, value, allowed)
    for field, numbers in (
        ("tensor_parallel", tensor_parallel),
        ("pipeline_parallel", pipeline_parallel),
    ):
        for number in numbers:
            check_size(field, number)
    return [_combined(model, *setting) for model in loaded for setting in product(*settings)]


def _combined(
    model: Model, gpu: str, runtime: str, dtype: str | None, kv: str | None, tp: int, pp: int
) -> Combination:
    computed = dtype or model.dtype
    layout = (str(tp), str(pp), str(tp * pp))
    labels = (model.name, gpu, runtime, computed, kv or computed, *layout)
    try:
        deploy = Deployment(
            gpu=gpu,
            runtime=runtime,
            dtype=dtype,
            kv_dtype=kv,
            tensor_parallel=tp,
            pipeline_parallel=pp,
        )
    except ConfigError as error:
        return Combination(model=model, deploy=None, labels=labels, refused=str(error))
    return Combination(model=model, deploy=deploy, labels=labels)


def evaluated(
    every: Sequence[Combination],
    batches: NDArray[np.int64],
    contexts: NDArray[np.int64],
    *,
    output_tokens: int,
    latency: bool,
    routing: Routing = UNIFORM,
    tell: Callable[[int, int], None] | None = None,
) -> Iterator[Block]:
    """All cells, some at a time: combination by combination, batch by batch."""
    rows = max(1, CHUNK_CELLS // len(contexts))
    whole, done = len(every) * len(batches) * len(contexts), 0
    for combination in every:
        prepared, why = _prepared(combination)
        for start in range(0, len(batches), rows):
            part = batches[start : start + rows]
            columns = _sizes(part, contexts, output_tokens)
            if prepared is None:
                yield _refused(combination, columns, why)
            else:
                yield _cells(combination, prepared, columns, latency=latency, routing=routing)
            done += len(part) * len(contexts)
            if tell is not None:
                tell(done, whole)


def _prepared(combination: Combination) -> tuple[Prepared | None, str]:
    if combination.deploy is None:
        return None, combination.refused
    try:
        prepared = prepare(combination.model, combination.deploy)
        prepared.shares()
    except ConfigError as error:
        return None, str(error)
    return prepared, ""


def _sizes(
    batches: NDArray[np.int64], contexts: NDArray[np.int64], output_tokens: int
) -> dict[str, NDArray[Any]]:
    batch, context = np.meshgrid(batches, contexts, indexing="ij")
    output = np.full(batch.size, output_tokens, dtype=np.int64)
    return dict(zip(SIZES, (batch.ravel(), context.ravel(), output), strict=True))


def _refused(combination: Combination, columns: dict[str, NDArray[Any]], why: str) -> Block:
    n = len(columns["batch"])
    return Block(
        combination=combination,
        numbers=columns,
        known=np.zeros(n, dtype=bool),
        refused=np.full(n, why, dtype=object),
    )


def _cells(
    combination: Combination,
    prepared: Prepared,
    columns: dict[str, NDArray[Any]],
    *,
    latency: bool,
    routing: Routing,
) -> Block:
    batch, context, output = (columns[name] for name in SIZES)
    limit = prepared.longest_context_tokens()
    refused = np.full(len(batch), "", dtype=object)
    refused[context > limit] = f"context_tokens reaches beyond {limit} of {prepared.model.name}"
    refused[context < output] = "context_tokens is less than output_tokens: no prompt is left"
    known = refused == ""
    numbers = {
        name: np.zeros(len(batch), dtype=np.float64 if name in TIMES else np.int64)
        for name in (*BYTES, *(TIMES if latency else ()))
    }
    numbers["fits"] = np.zeros(len(batch), dtype=bool)
    if known.any():
        fill = _fill if takes_arrays(prepared) else _fill_one_by_one
        try:
            fill(prepared, columns, numbers, known, refused, latency=latency, routing=routing)
        except ConfigError as error:
            refused[known] = str(error)
    return Block(
        combination=combination,
        numbers={**columns, **numbers},
        known=refused == "",
        refused=refused,
        latency_basis=_basis(prepared) if latency else "",
    )


def _basis(prepared: Prepared) -> str:
    from planner.timing.latency import basis_of
    from planner.timing.passes import passes_of

    passes = passes_of(prepared.model, prepared.setting, prepared.runtime.name, prepared.gpu)
    return basis_of(passes.speed)


def _fill(
    prepared: Prepared,
    columns: dict[str, NDArray[Any]],
    numbers: dict[str, NDArray[Any]],
    known: NDArray[np.bool_],
    refused: NDArray[Any],
    *,
    latency: bool,
    routing: Routing,
) -> None:
    """The known cells, all at once."""
    batch, context, output = (columns[name][known] for name in SIZES)
    output_tokens = int(output[0])
    work = Workloads(
        batch=batch.astype(np.float64),  # type: ignore[arg-type]
        prompt_tokens=(context - (output_tokens - 1)).astype(np.float64),  # type: ignore[arg-type]
        output_tokens=output_tokens,
        logits="last",
        routing=routing,
    )
    made = memory_grid(prepared, work)
    for name in BYTES:
        value = prepared.gpu.memory_bytes if name == "gpu_memory_bytes" else getattr(made, name)
        numbers[name][known] = -1 if value is None else value
    numbers["fits"][known] = made.fits
    if latency:
        took = time_grid(prepared, work)
        for name in TIMES:
            numbers[name][known] = getattr(took, name)


def _fill_one_by_one(
    prepared: Prepared,
    columns: dict[str, NDArray[Any]],
    numbers: dict[str, NDArray[Any]],
    known: NDArray[np.bool_],
    refused: NDArray[Any],
    *,
    latency: bool,
    routing: Routing,
) -> None:
    """An estimate for each cell: what a cell is refused for depends on its sizes."""
    if known.sum() > MAX_SINGLE_CELLS:
        raise ConfigError(
            f"kv_dtype={prepared.setting.kv_dtype!r} of runtime={prepared.runtime.name} is "
            f"estimated cell by cell: at most {MAX_SINGLE_CELLS:,}"
        )
    for place in np.flatnonzero(known):
        batch, context, output = (int(columns[name][place]) for name in SIZES)
        work = Inference(
            batch=batch,
            prompt_tokens=context - output + 1,
            output_tokens=output,
            logits="last",
            routing=routing,
        )
        try:
            e = estimate(prepared.model, work, prepared.deploy)
        except ConfigError as error:
            refused[place] = str(error)
            continue
        held = {**e.memory.parts(), "gpu_memory_bytes": e.gpu.memory_bytes}
        held |= {"headroom_bytes": e.headroom_bytes}
        for name in BYTES:
            numbers[name][place] = held.get(name, -1)
        numbers["fits"][place] = e.fits
        for name in TIMES if latency else ():
            took = getattr(e.latency, name)
            numbers[name][place] = np.nan if took is None else took
