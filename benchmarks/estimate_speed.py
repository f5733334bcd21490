"""How long an answer takes: import, one estimate, a grid of peaks.

Run `python benchmarks/estimate_speed.py`. Times depend on the machine; the
ratio to a plain NumPy pass over the same grid is printed beside.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import planner
from planner.activations import peak_bytes
from planner.program import Dims
from planner.runtimes.transformers_code.forward import pass_program
from planner.runtimes.transformers_code.regime import Pass, Regime


def median_s(run: Callable[[], Any], repeats: int = 15) -> float:
    """Median time of a call after one warm-up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Print a line for each figure."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import planner"], check=True)
    print(f"import planner (a fresh process)      {time.perf_counter() - start:8.3f} s")

    deploy = planner.Deployment(gpu="h200")
    work = planner.Inference(batch=8, prompt_tokens=4096, output_tokens=128, logits="last")
    for name in ("llama-3.1-8b", "gemma-2-9b", "deepseek-v3"):
        model = planner.load_model(name)
        each = median_s(lambda model=model: planner.estimate(model, work, deploy))
        print(f"one estimate, {name:<20}    {each * 1e3:8.2f} ms")

    what = Pass(kind="prefill", attention="sdpa", dtype="bf16", device="cuda", logits="last")
    model, point = planner.load_model("llama-3.1-8b"), Dims(batch=8, tokens=4096, context=4096)
    program = pass_program(model, what, Regime.of(model, point))
    for side in (32, 1000):
        batch, tokens = np.meshgrid(np.arange(1.0, side + 1), np.linspace(1, 131_072, side))
        dims = Dims(batch=batch, tokens=tokens, context=tokens)
        grid = median_s(lambda dims=dims: peak_bytes(program, dims), repeats=3)
        plain = median_s(lambda b=batch, t=tokens: np.maximum(b * t, t), repeats=3)
        print(
            f"peak over {side} × {side} cells            {grid * 1e3:8.1f} ms"
            f"  ({grid / plain:,.0f} × one NumPy multiply-and-maximum)"
        )


if __name__ == "__main__":
    main()
