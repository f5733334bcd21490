"""How fast the allocator's simulator plays: events a second, and whole workloads.

Run `python benchmarks/allocator_speed.py`.
"""

from __future__ import annotations

import random
import time

import planner
from planner.allocator import Alloc, AllocatorSettings, Event, Free, simulate
from planner.reserved import reserved

MIB = 2**20
SIZES = [100, 4096, 70_000, 3 * MIB, 17 * MIB, 130 * MIB]


def random_trace(events: int) -> list[Event]:
    """Allocations and frees in equal parts, hundreds of storages alive, small and large."""
    chance, trace, live = random.Random(0), [], []
    for name in range(events):
        if live and chance.random() < 0.5:
            trace.append(Free(live.pop(chance.randrange(len(live)))))
        else:
            trace.append(Alloc(name, chance.choice(SIZES)))
            live.append(name)
    return trace


def main() -> None:
    """Print a line for each figure."""
    trace = random_trace(400_000)
    for expandable in (False, True):
        settings = AllocatorSettings(expandable_segments=expandable)
        start = time.perf_counter()
        stats = simulate(trace, settings=settings)
        rate = stats.events / (time.perf_counter() - start)
        name = "expandable segments" if expandable else "segments"
        print(f"a random trace, {name:<36}{rate:12,.0f} events/s")

    deploy = planner.Deployment(gpu="h200")
    for name, batch, prompt, output in (
        ("llama-3.1-8b", 1, 2048, 1),
        ("llama-3.1-8b", 8, 8192, 512),
        ("llama-3.1-8b", 1, 128, 512),
        ("gemma-2-9b", 4, 2048, 256),
        ("mistral-7b-v0.1", 1, 512, 16_384),
    ):
        work = planner.Inference(
            batch=batch, prompt_tokens=prompt, output_tokens=output, logits="last"
        )
        estimate = planner.estimate(planner.load_model(name), work, deploy)
        reserved.cache_clear()
        start = time.perf_counter()
        played = estimate.allocator()
        assert played is not None
        print(
            f"{name}, {batch} × ({prompt} + {output}) tokens".ljust(52)
            + f"{time.perf_counter() - start:8.3f} s"
            f"  ({played.stats.events:,} events, {played.steps_played:,} of {played.steps:,} steps)"
        )


if __name__ == "__main__":
    main()
