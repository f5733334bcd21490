"""Which submodule two runs differ in first: outputs are compared in the order they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def recorded(module: nn.Module) -> Iterator[list[tuple[str, nn.Module, Tensor]]]:
    """Every submodule's output tensor, in the order they end."""
    made: list[tuple[str, nn.Module, Tensor]] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(m: nn.Module, args: Any, out: Any) -> None:
            first = out
            if not isinstance(first, Tensor):
                parts = out if isinstance(out, tuple | list) else ()
                first = next((p for p in parts if isinstance(p, Tensor)), None)
            if isinstance(first, Tensor) and first.is_floating_point() and first.dim() >= 2:
                made.append((name, m, first.detach().clone()))

        return hook

    handles = [m.register_forward_hook(keep(name)) for name, m in module.named_modules() if name]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def first_that(
    one: list[tuple[str, nn.Module, Tensor]],
    other: list[tuple[str, nn.Module, Tensor]],
    differs: Callable[[Tensor, Tensor], bool],
) -> tuple[str, nn.Module] | None:
    """The first submodule whose outputs differ in the way asked for."""
    for (name, m, a), (again, _, b) in zip(one, other, strict=False):
        if name != again:
            return None
        if differs(a, b):
            return name, m
    return None


def along_sequence(tensor: Tensor, tokens: int) -> Tensor | None:
    """The tensor with its sequence in dimension 1; None where it has none."""
    if tensor.dim() >= 2 and tensor.shape[1] == tokens:
        return tensor
    for dim in range(2, tensor.dim()):
        if tensor.shape[dim] == tokens:
            return tensor.movedim(dim, 1)
    return None


def named(name: str, module: nn.Module) -> str:
    """A submodule for people."""
    return f"{name} ({type(module).__name__})" if name else type(module).__name__
