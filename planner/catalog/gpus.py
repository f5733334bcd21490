"""The GPU catalogue: memory, bandwidth and dense FLOP/s, with the source of every figure."""

from __future__ import annotations

import difflib
import os
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from planner.catalog.here import Processor, device_here, processor
from planner.errors import ConfigError, shown


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device. `memory_bytes` is what torch sees of it; FLOP/s are dense, by dtype.

    `process_bytes`: what a process holds on it besides tensors, by cause, where it was measured.
    `processor`: which one a CPU is.
    """

    name: str
    label: str
    vendor: str
    architecture: str
    compute_capability: str | None
    torch_names: tuple[str, ...]
    memory_bytes: int
    datasheet_memory_bytes: int | None
    memory_bandwidth_bytes_per_s: float
    tdp_w: float | None
    multiprocessors: int | None
    l2_bytes: int | None
    interconnect: str | None
    interconnect_bytes_per_s: float | None
    dense_flops_per_s: tuple[tuple[str, float], ...]
    sources: tuple[tuple[str, str], ...]
    process_bytes: tuple[tuple[str, int], ...] = ()
    processor: Processor | None = None

    @property
    def is_cpu(self) -> bool:
        """Whether this is the machine's own processor."""
        return self.vendor == "cpu"

    def flops_per_s(self, dtype: str) -> float:
        """Dense peak for matrix products of `dtype`.

        A dtype without units of its own (bf16 on a T4) runs at the fp32 rate, which is outside
        tensor cores.
        """
        rates = dict(self.dense_flops_per_s)
        return rates.get(dtype, rates["fp32"])


@cache
def gpus() -> dict[str, Gpu]:
    """All devices by their short name, in the file's order."""
    text = files("planner.catalog").joinpath("gpus.toml").read_text(encoding="utf-8")
    return {name: _gpu(name, entry) for name, entry in tomllib.loads(text).items()}


def gpu_named(name: str) -> Gpu:
    """The device of this short name; ConfigError with the nearest names for another.

    "auto": the card of this machine, with the memory that is free on it now.
    """
    known = gpus()
    if name == "auto":
        return _gpu_here()
    if not isinstance(name, str) or name not in known:
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.4) or known
        raise ConfigError(f"gpu={shown(name)} is not in the catalogue: {', '.join(near)}")
    gpu = known[name]
    return replace(gpu, processor=processor()) if gpu.is_cpu else gpu


def _gpu_here() -> Gpu:
    """The card of this machine; `memory_bytes` is what of it is free."""
    name, free_bytes = device_here()
    known = gpu_of_torch_name(name)
    if known is None:
        raise ConfigError(f"gpu='auto' is {shown(name)} here, which is not in the catalogue")
    gpu = gpus()[known]
    return replace(gpu, memory_bytes=min(free_bytes, gpu.memory_bytes))


def gpu_of_torch_name(torch_name: str) -> str | None:
    """The short name of the device that torch calls so; None if the catalogue has none."""
    for name, gpu in gpus().items():
        if torch_name in gpu.torch_names:
            return name
    return None


def _gpu(name: str, entry: dict[str, Any]) -> Gpu:
    memory = entry.get("memory_bytes")
    if memory is None:  # the machine's own
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Gpu(
        name=name,
        label=entry["label"],
        vendor=entry["vendor"],
        architecture=entry["architecture"],
        compute_capability=entry.get("compute_capability"),
        torch_names=tuple(entry["torch_names"]),
        memory_bytes=memory,
        datasheet_memory_bytes=entry.get("datasheet_memory_bytes"),
        memory_bandwidth_bytes_per_s=entry["memory_bandwidth_bytes_per_s"],
        tdp_w=entry.get("tdp_w"),
        multiprocessors=entry.get("multiprocessors"),
        l2_bytes=entry.get("l2_bytes"),
        interconnect=entry.get("interconnect"),
        interconnect_bytes_per_s=entry.get("interconnect_bytes_per_s"),
        dense_flops_per_s=tuple(entry["dense_flops_per_s"].items()),
        sources=tuple(entry["sources"].items()),
        process_bytes=tuple(entry.get("process_bytes", {}).items()),
    )
