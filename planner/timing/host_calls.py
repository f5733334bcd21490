"""What a decode step asks of the host: kernels, views, calls of Python functions.

They were counted in the classes themselves (tools/host_calls.py → catalog/host_calls.json), for
each layer and for the pass around them. A type that was not counted asks for as much as llama.
Other caches than a runtime's usual one ask for more, whatever the type.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from planner.workload import CacheSpec

FILE = "host_calls.json"
USUAL = "llama"
PADDED = "padded"
"""Prompts that a mask tells from padding."""
USUAL_CACHES = {"attnlab": "static", "transformers": "dynamic"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Calls:
    """How often: ops that run a kernel (attention is one), calls of torch from Python that run
    none, calls of Python functions.
    """

    kernels: float
    views: float
    calls: float

    @staticmethod
    def of(row: list[float]) -> Calls:
        """As the file has them."""
        kernels, views, calls = row
        return Calls(kernels=kernels, views=views, calls=calls)

    def times(self, count: float) -> Calls:
        """So many of it."""
        return Calls(
            kernels=count * self.kernels, views=count * self.views, calls=count * self.calls
        )

    def plus(self, other: Calls) -> Calls:
        """Both together."""
        return Calls(
            kernels=self.kernels + other.kernels,
            views=self.views + other.views,
            calls=self.calls + other.calls,
        )


NOTHING = Calls(kernels=0.0, views=0.0, calls=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """Python functions that a checkpointed layer calls in a training step: `forward` beyond a
    plain layer's, `backward` with what is run again; of an adapted linear layer (LoRA, DoRA), too.
    """

    forward: float
    backward: float
    adapted: float
    adapted_forward: float
    adapted_backward: float


@lru_cache(maxsize=1)
def _content() -> dict[str, Any]:
    path = files("planner.catalog").joinpath(FILE)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


@lru_cache(maxsize=256)
def trained(model_type: str, *, selective: bool = False, dora: bool = False) -> Trained:
    """What training asks for beside the passes' own calls."""
    kinds = _content()["selective" if selective else "checkpointed"]
    lora = _content()["dora" if dora else "adapted"]
    forward, backward = kinds.get(model_type, kinds[USUAL])
    plain, _ = lora["plain"]
    return Trained(
        forward=forward,
        backward=backward,
        adapted=plain,
        adapted_forward=lora["checkpointed"][0],
        adapted_backward=lora["checkpointed"][1],
    )


def cache_name(
    engine: str, cache: CacheSpec | None, *, kv_dtype: str, dtype: str, padded: bool = False
) -> str:
    """What caches are told apart by, "paged int8"; empty for the one that an engine usually has."""
    if padded:
        return PADDED
    usual = USUAL_CACHES.get(engine)
    kind = usual if cache is None else cache.kind
    if cache is None and engine == "transformers" and kv_dtype != dtype:
        kind = "quantised"
    told = [] if kind == usual and kv_dtype == dtype else [str(kind)]
    told += [kv_dtype] * (kv_dtype != dtype)
    told += ["scaled"] * (kv_dtype == "fp8" and cache is not None and cache.scales is not None)
    return " ".join(told)


def more_of(engine: str, cache: str) -> tuple[Calls, Calls]:
    """What a layer, and the pass around them, asks for over a cache beyond the usual one."""
    found = _content()["caches"].get(engine, {}).get(cache)
    if found is None:
        return NOTHING, NOTHING
    layer, whole = (Calls.of(found[part]) for part in ("layer", "pass"))
    return layer, whole


@lru_cache(maxsize=256)
def counted(
    engine: str, model_type: str, attention: str, cache: str = ""
) -> tuple[Calls, Calls] | None:
    """Of one layer, and of the pass beside its layers; None for an engine that has no Python.

    `cache`: its cache_name.
    """
    kinds = _content()["counts"].get(engine)
    if kinds is None:
        return None
    entry = kinds.get(model_type, kinds[USUAL])
    found = entry.get(attention) or next(iter(entry.values()))
    layer, whole = (
        Calls.of(found[part]).plus(more)
        for part, more in zip(("layer", "pass"), more_of(engine, cache), strict=True)
    )
    return layer, whole
