"""The run: points one after the other, within a budget, each on disk soon after it was measured.

A point that fails becomes a record that says so, and the next one is measured. Points which the
file already has from the same kind of device are not measured again, so a run that was cut short is
taken up by starting it once more.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from planner import ConfigError
from profiles import environment, nvml, records
from profiles.microbench import costs
from profiles.microbench.allocator_ops import allocator_time
from profiles.microbench.buffers import Buffers, l2_bytes, pool_bytes
from profiles.microbench.graph_ops import graph_time
from profiles.microbench.host_ops import host_time
from profiles.microbench.op_record import (
    DEVICE_LOST,
    DeviceState,
    OpRecord,
    Writer,
    environment_hash,
    load,
)
from profiles.microbench.ops import Preparer
from profiles.microbench.point import OpPoint
from profiles.microbench.points import points
from profiles.microbench.timing import (
    Timing,
    own_stream,
    synchronize,
    time_idle,
    time_on_device,
    time_sustained,
)

Progress = Callable[[int, int, str], None]
"""Called with (points done, points in all, what comes next)."""

STATE_EVERY_S = 10.0
WARM_UP_S = 0.5
COLD_ON_CPU = ("gemm", "decode")
"""What reads weights or a cache, which the rest of a pass has driven out of a CPU's caches; what
other ops read there was just written."""
LONGEST_POINT_S = 2.0
"""No point begins with less than this left; the repeats at the end have their own reserve."""


def run(
    device: str = "auto",
    *,
    budget_s: float = math.inf,
    out: Path | str,
    only_missing: bool = True,
    families: Iterable[str] = (),
    on_progress: Progress | None = None,
) -> list[OpRecord]:
    """Measure what the file lacks (or everything), most useful first; the records of this run."""
    budget = Budget(budget_s)
    target = environment.find_device(device)
    chosen = points(target.type, families)
    records.check_writable(out)
    uuid = environment.device_uuid(target)
    report = on_progress or (lambda done, total, what: None)
    with (
        nvml.open_device(uuid) if uuid else nullcontext() as driver,
        own_stream(target),
        torch.no_grad(),
        Writer(out) as writer,
    ):
        here = environment.describe(target, driver)
        if only_missing:
            done = load(out).done(here)
            chosen = [point for point in chosen if point.key not in done]
        writer.write(here)
        bench = Bench(target, driver, environment_hash(here))
        bench.warm_up()
        return _measure_all(bench, chosen, writer, budget, report)


class Budget:
    """The time a run may take; a part of it is kept for the repeats at the end."""

    def __init__(self, seconds: float) -> None:
        self.deadline_s = time.perf_counter() + seconds
        self.margin_s = min(LONGEST_POINT_S, 0.1 * seconds)
        self.reserve_s = 0.0

    def allows(self, *, repeat: bool) -> bool:
        """Whether another point may begin."""
        left_s = self.deadline_s - time.perf_counter()
        return left_s > self.margin_s + (0.0 if repeat else self.reserve_s)


def _measure_all(
    bench: Bench,
    chosen: list[OpPoint],
    writer: Writer,
    budget: Budget,
    report: Progress,
) -> list[OpRecord]:
    """All points in order, then the repeats, for which the time they took at first is kept."""
    main = [point for point in chosen if not point.repeat]
    repeats = [point for point in chosen if point.repeat]
    again = {point.key.removesuffix("/repeat1") for point in repeats}
    state_due_s = 0.0
    measured: list[OpRecord] = []
    for index, point in enumerate([*main, *repeats]):
        if not budget.allows(repeat=bool(point.repeat)):
            continue
        if time.perf_counter() >= state_due_s:
            writer.write(bench.state())
            state_due_s = time.perf_counter() + STATE_EVERY_S
        report(index, len(chosen), point.key)
        record = bench.measure(point)
        writer.write(record)
        measured.append(record)
        if point.key in again:
            budget.reserve_s += 1.5 * record.wall_s
        if bench.lost:
            break
    if not bench.lost:
        writer.write(bench.state())
    report(len(measured), len(chosen), "done")
    return measured


@dataclass
class Bench:
    """The device that is measured on."""

    device: torch.device
    driver: nvml.NvmlDevice | None
    environment: str
    lost: bool = False  # a kernel died and took the CUDA context with it

    def __post_init__(self) -> None:
        self.l2_bytes = l2_bytes(self.device)
        free = environment.free_bytes(self.device)
        self.buffers = Buffers(device=self.device, pool_bytes=pool_bytes(self.device, free))

    def warm_up(self) -> None:
        """Bring the clocks up from idle."""
        side = 4096 if self.device.type == "cuda" else 256
        x = torch.randn(side, side, device=self.device)
        ends_s = time.perf_counter() + (WARM_UP_S if self.device.type == "cuda" else 0.05)
        while time.perf_counter() < ends_s:
            x @ x
            synchronize(self.device)

    def measure(self, point: OpPoint) -> OpRecord:
        """One point; whatever goes wrong is in the record's status."""
        started_s = time.perf_counter()
        preparer = Preparer(self.buffers)
        timing, status = self._attempt(point, preparer)
        wall_s = time.perf_counter() - started_s
        clock = self.driver.clocks().sm_hz if self.driver else None
        return OpRecord(
            family=point.family,
            op=point.op,
            shape=dict(point.shape),
            dtype=point.dtype,
            backend=point.backend,
            ran=preparer.ran,
            cache=point.cache,
            repeat=point.repeat,
            split=point.split,
            status=status,
            method=timing.method if timing else None,
            samples_s=timing.samples_s if timing else (),
            copies=timing.copies if timing else None,
            note=DEVICE_LOST if self.lost else timing.note if timing else None,
            energy_j=timing.energy_j if timing else None,
            flops=costs.flops(point),
            bytes=costs.floor_bytes(point),
            environment=self.environment,
            created_utc=_now(),
            wall_s=wall_s,
            sm_clock_hz=clock,
        )

    def state(self) -> DeviceState:
        """Clocks, temperature, throttling and energy now; all None without a driver."""
        if self.driver is None:
            return DeviceState(created_utc=_now())
        clocks = self.driver.clocks()
        return DeviceState(
            created_utc=_now(),
            sm_clock_hz=clocks.sm_hz,
            memory_clock_hz=clocks.memory_hz,
            temperature_c=self.driver.temperature_c(),
            throttle_reasons=self.driver.throttle_reasons(),
            energy_j=self.driver.energy_j(),
        )

    def _attempt(self, point: OpPoint, preparer: Preparer) -> tuple[Timing | None, str]:
        try:
            return self._time(point, preparer), "ok"
        except ConfigError:
            raise
        except Exception as error:
            status = _status(error)
        self._recover()
        return None, status

    def _time(self, point: OpPoint, preparer: Preparer) -> Timing:
        match point.family:
            case "host":
                return host_time(point, self.device)
            case "graph":
                return graph_time(point, self.device)
            case "allocator":
                return allocator_time(point, self.device)
            case "sustained":
                return self._sustained(point, preparer)
        rotated = max(1, costs.rotated_bytes(point))
        cold = self.device.type == "cuda" or point.family in COLD_ON_CPU
        return time_on_device(
            lambda: preparer.prepare(point),
            self.device,
            cold_copies=math.ceil(2 * self.l2_bytes / rotated) if cold else 1,
            warm=point.cache == "warm",
            capture=point.family != "optimizer",
        )

    def _sustained(self, point: OpPoint, preparer: Preparer) -> Timing:
        def energy_j() -> float | None:
            return self.driver.energy_j() if self.driver else None

        if point.op == "idle":
            return time_idle(energy_j)
        return time_sustained(lambda: preparer.prepare(point), self.device, energy_j)

    def _recover(self) -> None:
        """Give the failed point's memory back; a device that cannot even wait is lost."""
        gc.collect()
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError:
            self.lost = True


def _status(error: Exception) -> str:
    message = (str(error).strip().splitlines() or [""])[0][:200]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in message:
        return "oom"
    return f"error: {type(error).__name__}: {message}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
