"""Tiny kernels of several kinds, for graphs of one kind alone and of unlike ones in turn.

What a kernel takes longer that follows one of another kind is the difference: a graph of unlike
kernels less the mean of the graphs of each.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from profiles.microbench.buffers import DTYPES
from profiles.microbench.ops import Call
from profiles.microbench.point import OpPoint

UNLIKE = ("add", "mean", "cat", "silu", "mul")
"""Of a norm and a gated feed-forward."""
UNLIKE_PRODUCTS = ("add", "mean", "linear", "silu", "linear", "mul")
"""With products among them, as in a layer."""
ALIKE = "alike_"


def kinds_of(op: str) -> tuple[str, ...]:
    """The kinds that an op's kernels are in turn."""
    if op.startswith(ALIKE):
        return (op.removeprefix(ALIKE),)
    return {"unlike": UNLIKE, "unlike_products": UNLIKE_PRODUCTS}[op]


def unlike_calls(point: OpPoint, device: torch.device) -> list[Call]:
    """So many kernels, one a call."""
    width, dtype = point.shape["width"], DTYPES[point.dtype]
    x, y = (torch.randn(1, width, device=device, dtype=dtype) for _ in range(2))
    kernels = {kind: _kernel(kind, x, y) for kind in kinds_of(point.op)}
    return [kernels[kind] for kind in islice(cycle(kinds_of(point.op)), point.shape["kernels"])]


def _kernel(kind: str, x: Tensor, y: Tensor) -> Call:
    half = x.shape[-1] // 2
    kernels: dict[str, Callable[[], Tensor]] = {
        "add": lambda: x + y,
        "mean": lambda: x.mean(-1, keepdim=True),
        "cat": lambda: torch.cat((x[:, half:], y[:, :half]), dim=-1),
        "silu": lambda: nn.functional.silu(x),
        "mul": lambda: x * y,
    }
    if kind == "linear":
        w = torch.randn(x.shape[-1], x.shape[-1], device=x.device, dtype=x.dtype)
        return lambda: nn.functional.linear(x, w)
    return kernels[kind]
