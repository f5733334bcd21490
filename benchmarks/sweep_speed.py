"""How long sweeps take, and how much memory ten million cells need.

Run `python benchmarks/sweep_speed.py [CELLS]`. NumPy's own bandwidth (a copy of 256 MiB)
stands beside, and the loop that a tool without arrays would run.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import planner

MODEL, GPU = "llama-3.1-8b", "h200"


def best_s(run: Callable[[], Any], repeats: int = 3) -> float:
    """The shortest of some runs after a warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def grid(side: int, runtime: str, **more: Any) -> Any:
    """side × side cells."""
    contexts = np.linspace(1, 131_072, side).astype(int)
    return planner.sweep(MODEL, GPU, range(1, side + 1), contexts, runtime=runtime, **more)


def main(cells: int) -> None:
    """Print a line for each figure."""
    source = np.zeros(2**25)
    copy = best_s(lambda: source.copy())
    print(f"NumPy copies                          {2 * source.nbytes / copy / 1e9:8.1f} GB/s")
    model = planner.load_model(MODEL)
    deploy = planner.Deployment(gpu=GPU)
    for runtime in ("transformers", "vllm"):
        for side in (32, 1000):
            took = best_s(lambda side=side, runtime=runtime: grid(side, runtime))
            print(f"sweep {side} × {side} in {runtime:<12}  {took * 1e3:14.1f} ms with its frame")

    def loop() -> None:
        for batch in range(1, 33):
            for context in np.linspace(1, 131_072, 32).astype(int):
                work = planner.Inference(batch=batch, prompt_tokens=int(context), logits="last")
                planner.estimate(model, work, deploy)

    print(f"32 × 32 estimates in a loop           {best_s(loop, 1) * 1e3:8.1f} ms")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        side = round(cells**0.5)
        start = time.perf_counter()
        path = grid(side, "transformers", to=Path(folder) / "grid.parquet")
        took = time.perf_counter() - start
        size = path.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"{side * side:,} cells to Parquet: {took:.1f} s, {size / 1e6:,.0f} MB; the process held "
        f"{peak / 2**20:.2f} GiB at most ({before / 2**20:.2f} before)"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000)
