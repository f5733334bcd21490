"""This machine: its card, as the driver tells it, and its processor, as the system does."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from planner.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    """A CPU by the name that the system gives it, and the threads that torch computes with."""

    name: str
    threads: int

    @property
    def in_words(self) -> str:
        """ "AMD EPYC, 2 threads"."""
        return f"{self.name}, {self.threads} thread{'s' * (self.threads != 1)}"


_instead: ContextVar[Processor | None] = ContextVar("_instead", default=None)


@contextmanager
def as_on(processor: Processor | None) -> Iterator[None]:
    """Inside, the CPU that is meant by "cpu" is this one; None: this machine's, as always."""
    token = _instead.set(processor)
    try:
        yield
    finally:
        _instead.reset(token)


def processor() -> Processor:
    """The CPU that is meant by "cpu"."""
    return _instead.get() or _processor_here(os.environ.get("OMP_NUM_THREADS", ""))


@cache
def _processor_here(asked_threads: str) -> Processor:
    """Threads as torch takes them: OMP_NUM_THREADS, else a core each (at::init_num_threads)."""
    asked = asked_threads.split(",")[0].strip()
    threads = int(asked) if asked.isdecimal() and int(asked) else min(_cores(), _allowed())
    return Processor(name=processor_name() or "a CPU without a name", threads=threads)


@cache
def processor_name() -> str | None:
    """As Linux names it in /proc/cpuinfo, elsewhere as Python's platform does."""
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor() or None


def _cores() -> int:
    """Cores, not hardware threads; where the system does not say, the latter."""
    packages, cores = _cpuinfo("physical id"), _cpuinfo("core id")
    return len(set(zip(packages, cores, strict=False))) or os.cpu_count() or 1


def _allowed() -> int:
    """Hardware threads that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo(name: str) -> list[str]:
    """A field of /proc/cpuinfo, of each hardware thread; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    pairs = (line.partition(":") for line in lines)
    return [value.strip() for key, _, value in pairs if key.strip() == name]


def device_here() -> tuple[str, int]:
    """What the driver calls its first device, and the bytes of it that are free now.

    Raises ConfigError where there is no driver or device.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise ConfigError(f"gpu='auto' is not allowed here: no NVIDIA driver ({error})") from None
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        name = pynvml.nvmlDeviceGetName(handle)
        free_bytes = int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).free)
    except pynvml.NVMLError as error:
        raise ConfigError(f"gpu='auto' is not allowed here: {error}") from None
    finally:
        pynvml.nvmlShutdown()
    return name.decode() if isinstance(name, bytes) else name, free_bytes
