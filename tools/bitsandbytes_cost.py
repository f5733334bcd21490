"""What bitsandbytes' Python costs the host (timing/host_cost.py, UNPACKED and BLOCKWISE).

    python -m tools.bitsandbytes_cost

Its CUDA backend runs here over tensors on the CPU: what it calls in its library returns at once.
Timed are 4-bit layers beside plain ones, dequantising alone, and a step of AdamW8bit, in turns with
an identity module called in a loop; lower quartiles, in the process's own time.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from tools.checkpoint_cost import identity_s, undisturbed

WIDTH, ROWS, TURNS, LOOP, PARAMETERS = 64, 8, 15, 500, 100


class NoKernels:
    """A library whose functions take any arguments and return at once."""

    def __getattr__(self, name: str) -> Any:
        """A call of C, an object of its own each."""
        made = ctypes.CDLL(None)["getppid"]
        setattr(self, name, made)
        return made


def cuda_backend_on_cpu() -> None:
    """Registers the CUDA backend's functions for tensors on the CPU."""
    from bitsandbytes import _ops, cextension, functional

    register = _ops.register_kernel
    live: Any = torch
    live._C._cuda_getCurrentRawStream = lambda *_: 0
    live.cuda._exchange_device = live.cuda._maybe_exchange_device = abs
    untyped: Any = functional
    untyped._cuda_device_of = torch.cuda.device_of
    with (
        patch.object(cextension, "lib", NoKernels()),
        patch.object(_ops, "register_kernel", lambda op, _: register(op, "cpu")),
    ):
        from bitsandbytes.backends.cuda import ops
    ops._gemm_4bit_custom_max_m = 0  # a prompt's rows: the weight is made anew


def four_bit(*, nested: bool) -> Any:
    """A quantised linear layer."""
    import bitsandbytes

    untyped: Any = bitsandbytes.nn
    made = untyped.Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=torch.bfloat16)
    weight = torch.randn(WIDTH, WIDTH).bfloat16()
    made.weight = untyped.Params4bit(
        weight, requires_grad=False, compress_statistics=nested, quant_type="nf4"
    ).to("cpu")
    return made


def looped(run: Callable[[], object], loop: int = LOOP) -> float:
    """Seconds of one call."""
    start = time.process_time()
    for _ in range(loop):
        run()
    return (time.process_time() - start) / loop


def costs() -> dict[str, float]:
    """In calls of an identity module."""
    import bitsandbytes

    plain = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    layers = {"plain": plain, "nf4": four_bit(nested=False), "double": four_bit(nested=True)}
    cuda_backend_on_cpu()
    x = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    flowed = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16)
    trained = [nn.Parameter(torch.zeros(2 * WIDTH, WIDTH).bfloat16()) for _ in range(PARAMETERS)]
    for p in trained:
        p.grad = torch.zeros_like(p)
    untyped: Any = bitsandbytes.optim
    optimizer = untyped.AdamW8bit(trained)
    optimizer.step()
    runs: dict[str, Callable[[], object]] = {"addition": lambda: flowed + flowed}
    for name, layer in layers.items():
        runs[f"{name}, forward"] = lambda layer=layer: layer(x)  # type: ignore[misc]
        runs[f"{name}, both ways"] = lambda layer=layer: layer(x).backward(flowed)  # type: ignore[misc]
    found: dict[str, list[float]] = {}
    for _ in range(TURNS):
        for name, run in runs.items():
            found.setdefault(name, []).append(looped(run))
        step_s = looped(optimizer.step, 1) / PARAMETERS
        found.setdefault("AdamW8bit, a parameter", []).append(step_s)
        found.setdefault("identity", []).append(identity_s())
    each = {name: undisturbed(samples) for name, samples in found.items()}
    return {name: seconds / each["identity"] for name, seconds in each.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, ratio in costs().items():
        print(f"{name:24s} {ratio:7.1f}")
