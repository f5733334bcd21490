"""Meters: live bytes of tensors, the CUDA allocator's peaks, and time.

Three different things are called "memory used": what live tensors hold (this file's
LiveTensorMeter, any device), what torch's caching allocator has handed out and reserved
(`cuda_peaks`), and what the driver sees (`profiles.nvml`). None of them contains the next exactly.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveTensorMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages created inside this context, alive now and at most.

        with LiveTensorMeter() as meter:
            y = (x @ w).relu()
        meter.peak_bytes   # x and w were there before: not counted

    A storage counts once, however many views look at it, by `nbytes()`, from the end of the op that
    created it until nothing refers to it; one that an in-place op resizes counts at its new size.
    What a kernel allocates and frees inside itself is not seen, nor is an op's output before the op
    ends. With `device` only storages there count. Meter under `torch.no_grad`: `inference_mode`
    hides the parts of composite ops. Of a DTensor this rank's part counts. `events` (with
    `log=True`) lists (op, ± bytes) in order, a release under the op that ran before it.
    """

    def __init__(self, *, device: torch.device | None = None, log: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device_type = device.type if device else None
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_op: str | None = None
        self.ops: set[str] = set()
        self.events: list[tuple[str, int]] | None = [] if log else None
        self._op = "(start)"
        self._sizes: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the op, then count the storages that were not among its arguments."""
        kwargs = kwargs or {}
        self._op = func.name().removeprefix("aten::")
        self.ops.add(self._op)
        given = set() if self._op == "lift_fresh" else {_key(x) for x in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            key = _key(storage)
            if key in self._sizes:
                self._resize(key, storage.nbytes())
            elif key not in given and self.device_type in (None, storage.device.type):
                self._created(key, storage)
        return result

    def take_ops(self) -> set[str]:
        """Names of the ops that ran since the last call."""
        taken, self.ops = self.ops, set()
        return taken

    def reset_peak(self) -> None:
        """Start a new peak at what is alive now."""
        self.peak_bytes, self.peak_op = self.live_bytes, None

    def _created(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._sizes[key] = (weakref.ref(storage, lambda gone: self._released(key, gone)), size)
        self._change(size)

    def _resize(self, key: int, size: int) -> None:
        ref, before = self._sizes[key]
        if size != before:
            self._sizes[key] = (ref, size)
            self._change(size - before)

    def _released(self, key: int, gone: weakref.ref[torch.UntypedStorage]) -> None:
        if key in self._sizes and self._sizes[key][0] is gone:
            self._change(-self._sizes.pop(key)[1])

    def _change(self, change_bytes: int) -> None:
        self.live_bytes += change_bytes
        if self.events is not None and change_bytes:
            self.events.append((self._op, change_bytes))
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_op = self.live_bytes, self._op


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """numel × itemsize, each tensor object once: a view counts what it shows, not its storage."""
    unique = {id(t): t for t in tensors}
    return sum(t.numel() * t.element_size() for t in unique.values())


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors, each storage once: what they really hold."""
    unique = {_key(t.untyped_storage()): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in unique.values())


def module_bytes(module: torch.nn.Module) -> int:
    """Parameters (tied ones once) and buffers of a module, numel × itemsize."""
    return tensor_bytes([*module.parameters(), *module.buffers()])


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaPeaks:
    """Peaks of torch's caching allocator since the last `reset_cuda_peaks`."""

    allocated_bytes: int  # blocks in use, rounded to 512 B and more
    reserved_bytes: int  # segments held from the driver
    requested_bytes: int  # what was asked for, before rounding


def reset_cuda_peaks(device: torch.device) -> None:
    """Give cached segments back and start the allocator's peaks at what is in use now."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def cuda_peaks(device: torch.device) -> CudaPeaks:
    """The allocator's peaks, after all queued work is done."""
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    return CudaPeaks(
        allocated_bytes=stats["allocated_bytes.all.peak"],
        reserved_bytes=stats["reserved_bytes.all.peak"],
        requested_bytes=stats["requested_bytes.all.peak"],
    )


@dataclass(kw_only=True)
class Stopwatch:
    """Times steps on a device; the queue is empty before a step begins.

    CUDA: events before and after, so a step lasts from the moment its first kernel could run to the
    end of its last one, the host's work in between included; elsewhere the clock. `host_add_s` is
    how fast the host was right before each of `samples_s`: it may be half as fast a moment later.
    """

    device: torch.device
    samples_s: list[float] = field(default_factory=list)
    host_add_s: list[float] = field(default_factory=list)
    clock: Callable[[], float] = time.perf_counter

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time the block and keep the sample; a block that raises leaves none."""
        add_s = host_add_s(self.device)
        yield from self._timed()
        self.host_add_s.append(add_s)

    def clear(self) -> None:
        """Forget what was timed so far."""
        self.samples_s.clear()
        self.host_add_s.clear()

    def _timed(self) -> Iterator[None]:
        if self.device.type != "cuda":
            started = self.clock()
            yield
            self.samples_s.append(self.clock() - started)
            return
        torch.cuda.synchronize(self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        yield
        end.record()
        end.synchronize()
        self.samples_s.append(begin.elapsed_time(end) / 1e3)


HOST_ADDITIONS = 100
"""A millisecond of them; fewer than the kernels that a device lets wait, so none is waited for."""


def host_add_s(device: torch.device) -> float:
    """Seconds that the host needs to issue an addition of 64 elements: its speed at this moment.

    What issues a model's ops in eager mode shares its processor with others, and may be half as
    fast in one moment as in the next.
    """
    x = torch.ones(64, device=device)
    for _ in range(20):
        x + x
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(HOST_ADDITIONS):
        x + x
    return (time.perf_counter() - started) / HOST_ADDITIONS


NO_TENSORS = (int, float, str, type(None), torch.dtype, torch.device, torch.layout)


def _storages(
    tree: Any, found: list[torch.UntypedStorage] | None = None
) -> list[torch.UntypedStorage]:
    """Of the tensors among an op's arguments or results, which lie in lists, tuples and dicts."""
    found = [] if found is None else found
    if isinstance(tree, Tensor):
        found.append(getattr(tree, "_local_tensor", tree).untyped_storage())
    elif isinstance(tree, list | tuple):
        for part in tree:
            if not isinstance(part, NO_TENSORS):
                _storages(part, found)
    elif isinstance(tree, dict):
        for part in tree.values():
            _storages(part, found)
    return found


def _key(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)
