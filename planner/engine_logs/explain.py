"""Why an engine reports what it reports: its log beside the ledger."""

from __future__ import annotations

from dataclasses import replace

from planner.engine_logs.explanation import Explanation, Line, Remedy, close
from planner.engine_logs.out_of_memory import lighter_weights, memory_lines, memory_remedies
from planner.engine_logs.planning import longest_sequence
from planner.engine_logs.read import EngineLog, read_log
from planner.engine_logs.reasons import pool_reason, reason
from planner.engine_logs.remedies import remedies
from planner.engine_logs.setup import Setup, setup_of_log
from planner.errors import ConfigError
from planner.format import gib
from planner.ledger import total_bytes
from planner.model import Model
from planner.result import Estimate
from planner.workload import Deployment


def explain_log(
    text: str,
    model: Model | str | None = None,
    deploy: Deployment | None = None,
    *,
    gpu: str | None = None,
) -> Explanation:
    """A vLLM start-up log or a torch OutOfMemoryError beside the plan of the same deployment.

    `model` and `gpu` go before what the log names, `deploy` before all its arguments. Raises
    ConfigError for text that has nothing of either.
    """
    log = read_log(text)
    setup = setup_of_log(log, model, deploy, gpu)
    e, refusal = _planned(setup)
    asked = _asked_tokens(log, e)
    notes = [*setup.notes, *([f"not planned: {refusal}"] if refusal else [])]
    lines = [*_vllm_lines(log, e), *memory_lines(log, e)]
    theirs = log.size("kv_pool")
    offset = 0
    if theirs is not None and e is not None and e.pool is not None:
        offset = theirs - e.pool.available_bytes
    found: list[Remedy] = [*memory_remedies(log), *lighter_weights(log, e)]
    if e is not None and e.pool is not None and asked:
        found += remedies(e.model, e.deploy, asked_tokens=asked, offset_bytes=offset)
    fits = _fits(log, e)
    return Explanation(
        log=log,
        title=_title(log, e),
        verdict=_verdict(log, e, asked, fits),
        lines=tuple(lines),
        remedies=tuple(found),
        notes=tuple(notes),
        estimate=e,
        fits=fits,
        gpu_known=setup.deploy is not None,
        gpus_alike=setup.gpus_alike,
    )


def _planned(setup: Setup) -> tuple[Estimate | None, str]:
    """The estimate of one sequence as long as is served, and why there is none."""
    if setup.model is None or setup.deploy is None:
        return None, ""
    model, deploy = setup.model, setup.deploy
    longest = deploy.max_model_tokens or model.max_position_embeddings or 2048
    try:
        return longest_sequence(model, deploy, longest if deploy.runtime == "vllm" else 2), ""
    except ConfigError as error:
        return None, str(error)


def _asked_tokens(log: EngineLog, e: Estimate | None) -> int:
    """The longest sequence that is to be served."""
    for number in (
        log.arguments.max_model_len,
        log.size("concurrency_tokens"),
        e.pool.longest_tokens if e is not None and e.pool is not None else None,
    ):
        if number:
            return number
    return 0


def _vllm_lines(log: EngineLog, e: Estimate | None) -> list[Line]:
    """What vLLM prints, in the order in which it takes the memory."""
    if not log.is_vllm:
        return []
    pool = None if e is None else e.pool
    ours: dict[str, float | None] = dict.fromkeys(
        (
            *("gpu_memory", "budget", "weights", "activations", "outside", "kv_pool"),
            *("kv_blocks", "kv_tokens", "concurrency", "graphs", "needed"),
        )
    )
    if e is not None and pool is not None:
        rows = {row.item: row.size_bytes for row in e.rows if row.component == "overhead"}
        ours |= {
            "gpu_memory": e.gpu.memory_bytes,
            "budget": int(e.gpu.memory_bytes * e.deploy.memory_utilization),
            "weights": e.memory.weights_bytes,
            "activations": total_bytes(e.rows, "activations"),
            "outside": rows.get("outside torch", 0),
            "kv_pool": pool.available_bytes,
            "kv_blocks": pool.blocks,
            "kv_tokens": pool.tokens,
            "concurrency": pool.concurrency,
            "graphs": rows.get("CUDA graphs", 0),
            "needed": pool.longest_blocks * pool.block_bytes,
        }
    lines = []
    for item, name, unit in (
        ("GPU memory", "gpu_memory", "bytes"),
        ("budget, utilisation × memory", "budget", "bytes"),
        ("weights", "weights", "bytes"),
        ("profile-run peak", "activations", "bytes"),
        ("outside torch", "outside", "bytes"),
        ("KV pool", "kv_pool", "bytes"),
        ("KV blocks", "kv_blocks", "count"),
        ("KV tokens", "kv_tokens", "count"),
        ("sequences at once", "concurrency", "count"),
        ("one longest sequence", "needed", "bytes"),
        ("CUDA graphs", "graphs", "bytes"),
    ):
        theirs = _theirs(log, name)
        if theirs is None and ours[name] is None:
            continue
        if theirs is None and name in ("needed", "concurrency") and log.failure is None:
            continue
        figure = log.figures.get(name)
        lines.append(
            Line(
                item=item,
                unit="bytes" if unit == "bytes" else "count",
                theirs=theirs,
                ours=ours[name],
                quoted="" if figure is None else figure.line,
            )
        )
    parts = {line.item: line for line in lines}
    return [
        replace(
            line,
            why=pool_reason(parts) if line.item == "KV pool" else reason(line, log, e),
        )
        for line in lines
    ]


def _theirs(log: EngineLog, name: str) -> float | None:
    """A figure, or what follows from others that were printed."""
    value = log.get(name)
    weights, peak = log.get("weights"), log.get("peak_torch")
    if value is None and name == "activations" and peak is not None and weights is not None:
        return peak - weights  # 0.6.2–0.6.4 print the sum
    if value is None and name == "budget":
        memory, utilization = log.get("gpu_memory"), log.get("utilization")
        return None if memory is None or utilization is None else memory * min(utilization, 1.0)
    if value is None and name == "kv_tokens":
        blocks, pages = log.get("kv_blocks"), log.arguments.block_size or 16
        return None if blocks is None else blocks * pages
    return value


def _fits(log: EngineLog, e: Estimate | None) -> bool | None:
    if log.failure is not None:
        return False
    concurrency = log.get("concurrency")
    if concurrency is not None:
        return concurrency >= 1
    if e is not None and e.pool is not None:
        return e.pool.concurrency >= 1
    return None


def _title(log: EngineLog, e: Estimate | None) -> str:
    what = f"vLLM {log.version or 'of an unknown version'}" if log.is_vllm else "torch"
    if e is None:
        return f"{what}: a log, without a plan beside it"
    gpus = f"{e.deploy.world_size} × " if e.deploy.world_size > 1 else ""
    return (
        f"{what} beside the plan of {e.model.name} in vllm 0.19 on {gpus}{e.gpu.label}, "
        f"{e.setting.dtype}, KV cache {e.setting.kv_dtype}"
    )


def _verdict(log: EngineLog, e: Estimate | None, asked: int, fits: bool | None) -> str:
    if log.failure is not None:
        return f"It failed: {log.failure_line}"
    if e is None or e.pool is None:
        return "Nothing to compare with."
    theirs, ours = log.get("kv_pool"), e.pool.available_bytes
    if theirs is None:
        tokens = _theirs(log, "kv_tokens")
        theirs = None if tokens is None else tokens * ours / max(1, e.pool.tokens)
    if theirs is None:
        said = f"The plan has a pool of {gib(ours)}; the log does not say how large its own is."
    elif close(theirs, ours):
        said = "The KV pool is as planned."
    else:
        more = "larger" if theirs > ours else "smaller"
        said = f"The KV pool is {gib(abs(theirs - ours))} {more} than planned."
    if fits is False:
        said += f" No room for one sequence of {asked:,} tokens."
    return said
