"""What each runtime really holds. A number without its runtime is not an answer."""

from __future__ import annotations

from planner.errors import check_choice
from planner.runtimes.attnlab import Attnlab
from planner.runtimes.base import Runtime
from planner.runtimes.litgpt import LitGPT
from planner.runtimes.llamacpp import LlamaCpp
from planner.runtimes.torchtune import Torchtune
from planner.runtimes.transformers import Transformers
from planner.runtimes.vllm import Vllm

RUNTIMES: dict[str, Runtime] = {
    r.name: r for r in (Transformers(), Attnlab(), Vllm(), LlamaCpp(), LitGPT(), Torchtune())
}


def runtime_named(name: str) -> Runtime:
    """The runtime of this name; ConfigError for another."""
    return RUNTIMES[check_choice("runtime", name, RUNTIMES)]
