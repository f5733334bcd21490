"""How long tracing takes: a 32-layer 8B prefill, and two AdamW steps of it, on fake tensors.

Run `python benchmarks/trace_speed.py`.

Beside each the time of as many bare dispatches of one op, in the same run: machines differ.
"""

from __future__ import annotations

import time

import torch

from profiles.module_trace import fake_ids, trace_module
from profiles.targets import trace_target


def dispatches(count: int) -> float:
    """Seconds of `count` additions of two small tensors."""
    x = torch.zeros(8)
    started = time.perf_counter()
    for _ in range(count):
        x + x
    return time.perf_counter() - started


def main() -> None:
    """Print a line for each."""
    trace_module(torch.nn.Linear(8, 8), fake_ids(1, 8).float())  # imports
    for name, how in (
        ("prefill 1 × 4 096, last logits", {"logits": "last"}),
        ("two AdamW steps 1 × 4 096", {"train": True, "optimizer": "adamw"}),
    ):
        started = time.perf_counter()
        traced = trace_target("llama-3.1-8b", batch=1, tokens=4096, **how)
        whole = time.perf_counter() - started
        bare = dispatches(len(traced.made))
        print(
            f"{name:32} {traced.seconds:6.2f} s ({whole:.2f} s with building), "
            f"{len(traced.made):,} storages, {traced.seconds / bare:,.0f} × bare dispatches"
        )


if __name__ == "__main__":
    main()
