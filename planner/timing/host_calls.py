"""What a decode step asks of the host: kernels, views, calls of Python functions.

They were counted in the classes themselves (tools/host_calls.py → catalog/host_calls.json), for
each layer and for the pass around them. A type that was not counted asks for as much as llama.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

FILE = "host_calls.json"
USUAL = "llama"


@dataclass(frozen=True, kw_only=True, slots=True)
class Calls:
    """How often: ops that run a kernel (attention is one), calls of torch from Python that run
    none, calls of Python functions.
    """

    kernels: float
    views: float
    calls: float

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


@lru_cache(maxsize=256)
def counted(engine: str, model_type: str, attention: str) -> tuple[Calls, Calls] | None:
    """Of one layer, and of the pass beside its layers; None for an engine that has no Python."""
    kinds = _content()["counts"].get(engine)
    if kinds is None:
        return None
    entry = kinds.get(model_type, kinds[USUAL])
    found = entry.get(attention) or next(iter(entry.values()))
    layer, whole = (
        Calls(kernels=kernels, views=views, calls=calls)
        for kernels, views, calls in (found["layer"], found["pass"])
    )
    return layer, whole
