"""From what a log says to a model and a Deployment; what had to be assumed is said."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any

from planner.catalog.gpus import gpu_named, gpu_of_torch_name, gpus
from planner.engine_logs.models import model_of_log, short_name
from planner.engine_logs.read import EngineLog
from planner.errors import ConfigError
from planner.headers.hub import is_hub
from planner.huggingface import read_config
from planner.loading import load_model
from planner.model import Model
from planner.workload import Deployment

DTYPES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}
GRAPHS_INSIDE = (0, 21)
"""The version since which CUDA graphs come out of the pool."""
V0_SEQUENCES = 256
V0_TOKENS = 2048
V0_CHUNKED_FROM = 32_768


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """The model and the deployment that a log is about; None where it does not say enough.

    `gpus_alike`: where only the memory tells the GPU, all that have as much.
    """

    model: Model | None
    deploy: Deployment | None
    notes: tuple[str, ...]
    gpus_alike: tuple[str, ...] = ()


def setup_of_log(
    log: EngineLog, model: Model | str | None, deploy: Deployment | None, gpu: str | None
) -> Setup:
    """What is given goes before what the log says."""
    notes: list[str] = []
    alike: tuple[str, ...] = ()
    found = _model(log, model, notes)
    if deploy is None:
        if gpu is None:
            gpu, alike = _gpu(log, notes)
        if gpu is not None:
            device = gpu_named(gpu).name
            try:
                deploy = _deployment(log, found, device, notes)
            except ConfigError as error:  # what the log says, not its reader
                notes.append(f"not planned: {error}")
    elif gpu is not None:
        deploy = replace(deploy, gpu=gpu_named(gpu).name)
    return Setup(model=found, deploy=deploy, notes=tuple(notes), gpus_alike=alike)


def is_v0(log: EngineLog) -> bool:
    """Whether vLLM's first engine printed it: the default until 0.8."""
    version = version_of(log)
    lines = " ".join(figure.line for figure in log.figures.values())
    if "gpu_model_runner" in lines or "gpu_worker" in lines or (version or (0, 0)) >= (0, 11):
        return False
    if re.search(r"non_torch_memory|peak_torch_memory|executor_base|CPU blocks", lines):
        return True
    return version is not None and version < (0, 8)


def version_of(log: EngineLog) -> tuple[int, int] | None:
    """The first two numbers of the version."""
    match = re.match(r"(\d{1,4})\.(\d{1,4})", log.version or "")
    return None if match is None else (int(match[1]), int(match[2]))


def _model(log: EngineLog, given: Model | str | None, notes: list[str]) -> Model | None:
    if isinstance(given, Model):
        return given
    arguments = log.arguments
    if isinstance(given, str):
        own = is_hub(given) or os.path.exists(given)  # the reader's own, not the log's
        named = None if own else model_of_log(given, arguments.quantization)
        return load_model(given) if named is None else _noted(named, notes)
    if given is not None:
        raise ConfigError("model is neither a Model nor a name")
    if log.config is not None:
        try:
            model = read_config(log.config)
        except ConfigError as error:
            notes.append(f"the config in the log is not read: {error}")
        else:
            name = arguments.model or log.config.get("_name_or_path")
            short = short_name(name) if isinstance(name, str) else ""
            return replace(model, name=short or model.name)
    if arguments.model is None:
        notes.append("the log names no model: name it (--model) to see the plan beside it")
        return None
    named = model_of_log(arguments.model, arguments.quantization)
    if named is None:
        notes.append(
            f"{arguments.model[:80]!r} is not in the catalogue: name a model, a config.json or "
            "hf:org/name (--model) to see the plan beside it"
        )
        return None
    return _noted(named, notes)


def _noted(named: tuple[Model, str], notes: list[str]) -> Model:
    model, assumed = named
    notes.append(f"the model is taken as {model.name}{f', {assumed}' if assumed else ''}")
    return model


def _deployment(log: EngineLog, model: Model | None, gpu: str, notes: list[str]) -> Deployment:
    a = log.arguments
    if not log.is_vllm:
        return Deployment(gpu=gpu, dtype=DTYPES.get(a.dtype or ""))
    fields: dict[str, Any] = {
        "gpu": gpu,
        "runtime": "vllm",
        "tensor_parallel": a.tensor_parallel_size or 1,
        "pipeline_parallel": a.pipeline_parallel_size or 1,
        "memory_utilization": a.gpu_memory_utilization or log.get("utilization") or 0.9,
        "mode": "eager" if a.enforce_eager else "graph",
        "max_model_tokens": a.max_model_len or log.size("concurrency_tokens"),
        "max_sequences": a.max_num_seqs or log.size("sampler_rows"),
        "max_batched_tokens": a.max_num_batched_tokens or log.size("batched_tokens"),
        "dtype": DTYPES.get(a.dtype or ""),
        "kv_dtype": "fp8" if (a.kv_cache_dtype or "").startswith("fp8") else None,
    }
    if a.quantization == "fp8" and model is not None and model.quantization is None:
        fields["weight_dtype"] = "fp8"
    elif a.quantization and (model is None or model.quantization is None):
        notes.append(f"weights quantised by {a.quantization} are planned as they were before")
    if (version_of(log) or (0, 0)) >= GRAPHS_INSIDE:
        fields["cuda_graphs"] = "inside"
    if a.block_size:
        fields["block_tokens"] = a.block_size
    if not 0 < fields["memory_utilization"] <= 1:
        fields["memory_utilization"] = 0.9
    if is_v0(log):
        _first_engine(fields, model, notes)
    return Deployment(**fields)


def _first_engine(fields: dict[str, Any], model: Model | None, notes: list[str]) -> None:
    """V0's defaults: 256 sequences; a pass takes a whole prompt, or 2 048 tokens of a long one.

    EngineArgs.create_engine_config (engine/arg_utils.py) of 0.6–0.8: chunked from 32k on.
    """
    fields["max_sequences"] = fields["max_sequences"] or V0_SEQUENCES
    longest = fields["max_model_tokens"] or (model.max_position_embeddings if model else None)
    if fields["max_batched_tokens"] is None and longest is not None:
        chunked = longest > V0_CHUNKED_FROM
        fields["max_batched_tokens"] = V0_TOKENS if chunked else max(longest, V0_TOKENS)
    notes.append("vLLM's first engine (V0), whose profile run and sampler differ from 0.19's")


def _memory_by_sum(log: EngineLog) -> float | None:
    """Weights, peak, the rest and the pool over the utilisation, where all are printed."""
    parts = [log.get(name) for name in ("weights", "activations", "outside", "kv_pool")]
    utilization = log.arguments.gpu_memory_utilization or log.get("utilization") or 0.9
    if any(part is None for part in parts):
        return None
    return sum(part for part in parts if part is not None) / utilization


def _gpu(log: EngineLog, notes: list[str]) -> tuple[str | None, tuple[str, ...]]:
    """The GPU by its name, else by its memory; and all that have as much."""
    for torch_name in log.arguments.gpu_names:
        known = gpu_of_torch_name(torch_name)
        if known is not None:
            return known, ()
    seen = log.get("gpu_memory") or log.get("capacity") or _memory_by_sum(log)
    alike = [
        g
        for g in gpus().values()
        if g.vendor in ("nvidia", "amd") and seen and abs(g.memory_bytes - seen) < 0.006 * seen
    ]
    if not alike:
        notes.append("the log does not say which GPU: name it (--gpu) to see the plan beside it")
        return None, ()
    alike.sort(key=lambda g: abs(g.memory_bytes - (seen or 0)))
    others = ", ".join(g.name for g in alike[1:4])
    also = f" (as much: {others})" if others else ""
    notes.append(f"taken for {alike[0].label} by its memory{also}; name another with --gpu")
    return alike[0].name, tuple(g.name for g in alike)
