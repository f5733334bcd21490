"""What a record measured, traced: the same module and passes on fake tensors, without the device.

Nothing of the planner's formulas is in it, and nothing of the measurement: the modules of
workloads.py run with shapes alone. Where the kernels differ from a CPU's, so do their tensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

import torch

import planner
from planner.errors import ConfigError
from profiles.meters import LiveTensorMeter
from profiles.module_trace import fake_copy, fake_ids
from profiles.points import cache_of
from profiles.records import Record
from profiles.trace import _fake_mode, _shapes_only, _told
from profiles.workloads import Logits, Workload, build

TRACED = ("weights_bytes", "kv_cache_bytes", "peak_live_bytes")
"""The quantities that a trace has: allocated and reserved are the allocator's."""


def traced(record: Record) -> dict[str, int]:
    """Weights, cache and, where the record's phase has one, the peak, in bytes.

    Raises ConfigError in one line for a module whose forward needs values.
    """
    if record.padded:
        raise ConfigError("padded=True is not traced: what a mask hides are values")
    seen = _traced(_Work.of(record))
    return {name: seen[name] for name in TRACED if record.phase != "decode" or name != TRACED[2]}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """What of a record decides its trace; equal work is traced once."""

    config_json: str
    runtime: str
    attention: str | None
    dtype: str
    batch: int
    prompt_tokens: int
    output_tokens: int
    logits: Logits
    kv_dtype: str
    cache: planner.CacheSpec | None

    @staticmethod
    def of(record: Record) -> _Work:
        return _Work(
            config_json=json.dumps(record.config, sort_keys=True),
            runtime=record.runtime,
            attention=record.attention.split(":")[0] if record.attention else None,
            dtype=record.dtype,
            batch=record.batch,
            prompt_tokens=record.prompt_tokens,
            output_tokens=record.output_tokens,
            logits=record.logits,
            kv_dtype=record.kv_dtype,
            cache=cache_of(record),
        )


@lru_cache(maxsize=256)
def _traced(work: _Work) -> dict[str, int]:
    config = json.loads(work.config_json)
    try:
        with _fake_mode(), _shapes_only(), torch.no_grad():
            workload = build(
                planner.read_config(config),
                runtime=work.runtime,
                attention=work.attention,
                dtype=work.dtype,
                device=torch.device("cpu"),
                kv_dtype=work.kv_dtype,
                cache=work.cache,
            )
            fake_copy(workload.module)
            return _passes(workload, work)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_told(f"tracing {config.get('model_type')}", error)) from None


def _passes(workload: Workload, work: _Work) -> dict[str, int]:
    """Prefill, first and last decode step: those among which the peak lies."""
    context = work.prompt_tokens + work.output_tokens - 1
    peak, kv_cache_bytes = 0, 0
    passes = [(work.prompt_tokens, False)]
    if work.output_tokens > 1:
        passes += [(work.prompt_tokens, True), (context - 1, True)]
    for tokens, decodes in dict.fromkeys(passes):
        logits: Logits = work.logits if tokens == work.prompt_tokens else "last"
        prompt, token = fake_ids(work.batch, tokens), fake_ids(work.batch, 1)
        with LiveTensorMeter() as meter:
            workload.begin(batch=work.batch, capacity_tokens=context)
            _run(workload, prompt, logits)
            if decodes:
                meter.reset_peak()
                _run(workload, token, logits)
            kv_cache_bytes = workload.kv_cache_bytes()
        workload.end()
        peak = max(peak, meter.peak_bytes)
    weights = workload.weights_bytes
    return dict(zip(TRACED, (weights, kv_cache_bytes, weights + peak), strict=True))


def _run(workload: Workload, ids: torch.Tensor, logits: Logits) -> None:
    """One pass and its greedy token, as the runner makes them."""
    for _ in workload.tokens(ids, output_tokens=1, logits=logits):
        pass
