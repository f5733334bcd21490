"""Every storage that ops create and release, in order: a trace that planner.allocator can play."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from planner.allocator import Alloc, Event, Free, Mark
from profiles.meters import LiveTensorMeter, _key

GEMMS = frozenset(("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm"))
"""Ops that run a cuBLAS product: before the first, torch allocates its workspace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """A storage: who made it, when, and what it turned out to be."""

    size_bytes: int
    op: str
    module: str  # dotted name of the innermost module whose forward was running; "" outside
    phase: str


class AllocationRecorder(LiveTensorMeter):  # type: ignore[no-untyped-call]
    """A LiveTensorMeter that keeps the whole story: `events` for the allocator, ids in order.

    `made[id]` is what an id stands for, `kinds[id]` what kind of storage it was said to be.
    `phase(name)` begins a phase; `add` counts storages that were there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[Event] = []
        self.made: list[Allocation] = []
        self.kinds: dict[int, str] = {}
        self.first_gemm: int | None = None
        self._ids: dict[int, int] = {}
        self._modules: list[str] = []
        self._phase = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the op and record what it made."""
        if self.first_gemm is None and func.overloadpacket.__name__ in GEMMS:
            self.first_gemm = len(self.trace)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def phase(self, name: str) -> None:
        """Begin a phase."""
        self._phase = name
        self.trace.append(Mark(name))

    def add(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Storages that exist already, each once, in order."""
        self._op = f"({kind})"
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if _key(storage) not in self._ids:
                self._created(_key(storage), storage)
        self.classify(tensors, kind)

    def classify(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Say what the storages behind these tensors are."""
        for tensor in tensors:
            made = self._ids.get(_key(tensor.untyped_storage()))
            if made is not None:
                self.kinds[made] = kind

    @contextmanager
    def names_of(self, module: torch.nn.Module) -> Iterator[None]:
        """Know by name which submodule of `module` is running."""
        names = {id(part): name for name, part in module.named_modules()}

        def enter(part: torch.nn.Module, _: Any) -> None:
            self._modules.append(names.get(id(part), type(part).__name__))

        def leave(part: torch.nn.Module, _: Any, __: Any) -> None:
            self._modules.pop()

        hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._modules.clear()

    def _created(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._ids[key] = len(self.made)
        self.trace.append(Alloc(len(self.made), size))
        module = self._modules[-1] if self._modules else ""
        self.made.append(Allocation(size_bytes=size, op=self._op, module=module, phase=self._phase))
        super()._created(key, storage)

    def _released(self, key: int, gone: weakref.ref[torch.UntypedStorage]) -> None:
        if key in self._sizes and self._sizes[key][0] is gone:
            self.trace.append(Free(self._ids.pop(key)))
        super()._released(key, gone)

    def _resize(self, key: int, size: int) -> None:
        ref, before = self._sizes[key]
        storage = ref()
        if size != before and storage is not None:
            self.trace.append(Free(self._ids.pop(key)))
            self._change(-self._sizes.pop(key)[1])
            self._created(key, storage)
