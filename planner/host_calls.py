"""What a decode step asks of Python besides its kernels: views, and calls of Python functions.

Both were counted in the classes themselves (tools/host_calls.py → catalog/host_calls.json), for
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
    """How often: calls of torch that run no kernel, and calls of Python functions."""

    views: float
    calls: float


@lru_cache(maxsize=1)
def _counts() -> dict[str, dict[str, dict[str, dict[str, list[float]]]]]:
    path = files("planner.catalog").joinpath(FILE)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return dict(found["counts"])


@lru_cache(maxsize=256)
def counted(engine: str, model_type: str, attention: str) -> tuple[Calls, Calls] | None:
    """Of one layer, and of the pass beside its layers; None for an engine that has no Python."""
    kinds = _counts().get(engine)
    if kinds is None:
        return None
    entry = kinds.get(model_type, kinds[USUAL])
    found = entry.get(attention) or next(iter(entry.values()))
    layer, whole = (Calls(views=v, calls=c) for v, c in (found["layer"], found["pass"]))
    return layer, whole
