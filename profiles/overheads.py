"""What a process holds on a device besides its tensors: measured, one step after another.

    python -m profiles.overheads --out measurements/overheads.jsonl

The context, the kernels that are loaded when first used, the workspaces that cuBLAS has torch
allocate, the memory of CUDA graphs. Each step of overhead_steps.py runs once, then the driver and
torch are asked; a row is what was held then, and its growth over the row before is what the step
added. It says so only in a fresh process: run it as its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from planner import ConfigError
from planner.errors import shown
from profiles import environment, nvml, records
from profiles.overhead_steps import STEPS, Step
from profiles.records import Environment

SCHEMA = 1

BEFORE = "before CUDA"


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """What is held after one step; unknown is None.

    NVML's `used_bytes` is the whole device's; less what it was before this process and less
    `reserved_bytes`, it is what the process holds outside torch's allocator.
    """

    step: str
    status: str  # "ok", "oom" or "error: …"
    used_bytes: int | None  # NVML v2: every process, without the driver's reserve
    process_used_bytes: int | None  # NVML, this process, where the driver tells it
    driver_reserve_bytes: int | None  # NVML: in no other figure here
    allocated_bytes: int | None  # torch: blocks in use, the step's own tensors gone
    peak_allocated_bytes: int | None  # torch: the most since the row before
    reserved_bytes: int | None  # torch: segments
    environment: Environment
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ConfigError(f"schema={shown(self.schema)} is not known: this reads {SCHEMA}")


def to_json(row: Overhead) -> str:
    """The row as one line of JSON, without the newline."""
    return json.dumps(asdict(row), ensure_ascii=False, allow_nan=False)


def from_json(line: str) -> Overhead:
    """The row of one line; ConfigError says what is wrong with it."""
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"not a JSON record: {error}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise ConfigError(f"not an overhead of schema {SCHEMA}: {shown(content)}")
    return Overhead(**records.arguments(Overhead, content, where=""))


def measure_overheads(
    device: torch.device,
    driver: nvml.NvmlDevice | None,
    *,
    before_bytes: int | None = None,
    steps: Mapping[str, Step] = STEPS,
    on_row: Callable[[Overhead], None] = lambda row: None,
) -> list[Overhead]:
    """A row for each step, in a process that has done nothing on the device yet.

    `before_bytes`: NVML's used before anything in this process asked for the device, the first row.
    `on_row` is called with each row when it is there. A step that fails is a row with that status;
    after an error of CUDA that does not pass, so are those behind it.
    """
    env = environment.describe(device, driver)
    meter = _Meter(device, driver, env)
    rows = [meter.before(before_bytes)]
    on_row(rows[0])
    for name, step in steps.items():
        kept, status = _attempt(step, device)
        row = meter.row(name, status)
        del kept  # what had to live until it was looked at
        rows.append(row)
        on_row(row)
    return rows


def growth_bytes(rows: Sequence[Overhead]) -> list[dict[str, int | None]]:
    """For each row but the first, how its figures differ from the row before; None if unknown."""
    names = [f.name for f in fields(Overhead) if f.name.endswith("_bytes")]

    def difference(name: str, before: Overhead, after: Overhead) -> int | None:
        low, high = getattr(before, name), getattr(after, name)
        return None if low is None or high is None else high - low

    return [{name: difference(name, *pair) for name in names} for pair in pairwise(rows)]


class _Meter:
    """Asks the driver and torch."""

    def __init__(
        self, device: torch.device, driver: nvml.NvmlDevice | None, env: Environment
    ) -> None:
        self._device, self._driver, self._env = device, driver, env

    def before(self, used_bytes: int | None) -> Overhead:
        reserve = self._driver.reserve_bytes() if self._driver else None
        return self._made(BEFORE, "ok", {"used_bytes": used_bytes, "driver_reserve_bytes": reserve})

    def row(self, step: str, status: str) -> Overhead:
        values, problem = _attempt(lambda device: self._torch(), self._device)
        if status == "ok":
            status = problem
        return self._made(step, status, (values or {}) | self._nvml())

    def _torch(self) -> dict[str, int]:
        """Wait for the device, where waiting would not be its first use, and read the allocator."""
        device = self._device
        gc.collect()
        if torch.cuda.memory_reserved(device):
            torch.cuda.synchronize(device)
        stats = torch.cuda.memory_stats(device)
        values = {
            "allocated_bytes": stats.get("allocated_bytes.all.current", 0),
            "peak_allocated_bytes": stats.get("allocated_bytes.all.peak", 0),
            "reserved_bytes": stats.get("reserved_bytes.all.current", 0),
        }
        if torch.cuda.memory_reserved(device):
            torch.cuda.reset_peak_memory_stats(device)
        return values

    def _nvml(self) -> dict[str, int | None]:
        if self._driver is None:
            return {}
        return {
            "used_bytes": self._driver.memory_used_bytes(),
            "process_used_bytes": self._driver.process_used_bytes(os.getpid()),
            "driver_reserve_bytes": self._driver.reserve_bytes(),
        }

    def _made(self, step: str, status: str, values: Mapping[str, int | None]) -> Overhead:
        names = [f.name for f in fields(Overhead) if f.name.endswith("_bytes")]
        known: dict[str, Any] = {name: values.get(name) for name in names}
        return Overhead(step=step, status=status, environment=self._env, **known)


def _attempt(step: Callable[[torch.device], Any], device: torch.device) -> tuple[Any, str]:
    """What the step returned and "ok", or None and how it failed; interrupts go through."""
    try:
        return step(device), "ok"
    except (torch.OutOfMemoryError, MemoryError):
        return None, "oom"
    except Exception as error:
        message = (str(error).strip().splitlines() or [""])[0][:300]
        return None, f"error: {type(error).__name__}: {message}"


def _line(row: Overhead, growth: Mapping[str, int | None]) -> str:
    def mib(size: int | None) -> str:
        return f"{size / 2**20:+9.1f}" if size is not None else "        –"

    names = ("used_bytes", "reserved_bytes", "allocated_bytes")
    status = "" if row.status == "ok" else f"  {row.status}"
    return f"{row.step:30}{''.join(mib(growth.get(name)) for name in names)}{status}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure this machine's device and append the rows to a file."""
    parser = argparse.ArgumentParser(prog="python -m profiles.overheads", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON Lines, appended to")
    out: Path = parser.parse_args(arguments).out
    before = nvml.used_bytes_by_uuid()  # before torch looks for the device
    try:
        device = environment.find_device("cuda")
        records.check_writable(out)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    uuid = environment.device_uuid(device)
    rows: list[Overhead] = []

    def note(row: Overhead) -> None:
        rows.append(row)
        records.append_lines(out, [to_json(row)])
        print(_line(row, (growth_bytes(rows[-2:]) or [{}])[0]), flush=True)

    print(f"{'MiB more than before':30}{'NVML':>9}{'reserved':>9}{'alloc.':>9}")
    with nvml.open_device(uuid) if uuid else nullcontext() as driver:
        before_bytes = before.get(uuid) if uuid else None
        measure_overheads(device, driver, before_bytes=before_bytes, on_row=note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
