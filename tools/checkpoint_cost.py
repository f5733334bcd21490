"""How long a call of checkpointing takes beside one of identity (timing/host_cost.py, HOOKED and
SELECTED).

    python -m tools.checkpoint_cost

Small decoders of 12 and 24 layers take training steps on this CPU, checkpointed and not, in turns,
with an identity module called in a loop between them. What a layer takes longer, over the Python
calls that it makes more (catalog/host_calls.json), is the price of one. Of many steps the lower
quartile is taken, in the process's own time: who shares the processor only ever makes them longer,
through its caches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import planner
from planner import Training
from planner.timing.host_calls import counted, trained
from planner.timing.host_cost import MODULE_CALLS
from profiles.training_methods import prepared
from profiles.workloads import build
from tools.host_calls import BATCH, DEPTHS, PROMPT, Checkpointing, config

KINDS = ("llama", "mistral", "qwen3", "phi", "gpt2")
STEPS, LOOP = 24, 2000


class Identity(nn.Module):
    """What profiles/microbench/host_ops.py times as identity_module."""

    def forward(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


def steps_s(module: Any) -> tuple[float, float]:
    """Seconds of one forward and one backward pass."""
    ids = torch.zeros((BATCH, PROMPT), dtype=torch.int64)
    start = time.process_time()
    loss = module(input_ids=ids, labels=ids, use_cache=False).loss
    between = time.process_time()
    loss.backward()
    return between - start, time.process_time() - between


def identity_s() -> float:
    """Seconds of a call of a module that does nothing."""
    module, x = Identity(), torch.zeros(1)
    start = time.process_time()
    for _ in range(LOOP):
        module(x)
    return (time.process_time() - start) / LOOP


def undisturbed(samples: Iterable[float]) -> float:
    """Their lower quartile."""
    return statistics.quantiles(samples, n=4)[0]


def ratios(kind: str, policy: Checkpointing, *, steps: int = STEPS) -> tuple[float, float]:
    """Of a call forward and on the way back."""
    modules: dict[tuple[int, Checkpointing], Any] = {}
    for layers in DEPTHS:
        model = planner.read_config(config(kind, layers))
        for checkpointing in ("none", policy):
            made: Any = build(
                model,
                runtime="transformers",
                attention="sdpa",
                dtype="bf16",
                device=torch.device("cpu"),
            ).module.train()
            work = Training(batch=BATCH, sequence_tokens=PROMPT, checkpointing=checkpointing)
            modules[layers, checkpointing] = prepared(made, work, dtype="bf16", weight_dtype=None)
    found: dict[tuple[int, Checkpointing], list[tuple[float, float]]] = {key: [] for key in modules}
    calls = []
    for _ in range(steps):
        for key, made in modules.items():
            found[key].append(steps_s(made))
        calls.append(identity_s() / MODULE_CALLS)
    few, many = DEPTHS

    def layer_s(checkpointing: Checkpointing, part: int) -> float:
        a, b = (undisturbed(s[part] for s in found[n, checkpointing]) for n in DEPTHS)
        return (b - a) / (many - few)

    call_s, made_calls = undisturbed(calls), trained(kind, selective=policy == "selective")
    usual = counted("transformers", kind, "sdpa")
    assert usual is not None
    forward = layer_s(policy, 0) - layer_s("none", 0)
    backward = layer_s(policy, 1) - layer_s("none", 1) - layer_s("none", 0)
    return (
        forward / (made_calls.forward * call_s),
        backward / ((made_calls.backward - usual[0].calls) * call_s),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    policies: tuple[Checkpointing, ...] = ("full", "selective")
    for policy in policies:
        for name in KINDS:
            forward, backward = ratios(name, policy)
            print(f"{policy:9s} {name:10s} {forward:.2f} forward, {backward:.2f} on the way back")
