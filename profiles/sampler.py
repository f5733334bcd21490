"""A thread that asks the driver about one device while something runs: the NVML series of a run.

    with nvml.open_device(uuid) as device, Sampler(device) as sampler:
        load()
        sampler.mark("prefill")
        ...
    sampler.series                       # what was seen, and what seeing it cost

A poll misses what is shorter than its interval: peaks come from torch's allocator (meters.py), and
this series shows how the device got there. NVML's own figures are slower still: power is a mean
over a second, utilisation over 1/6–1 s.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Any, Self

from planner import ConfigError
from planner.errors import shown
from profiles.nvml import NvmlDevice

SCHEMA = 1

INTERVAL_S = 0.02
JOIN_S = 10.0
"""A driver call that hangs longer than this is left behind: the thread is a daemon."""

COLUMNS = (
    "used_bytes",
    "power_w",
    "sm_clock_hz",
    "memory_clock_hz",
    "temperature_c",
    "utilisation",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A name for what begins at this moment."""

    name: str
    time_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """What one device said during one run; times in seconds since its start.

    Columns are as long as `time_s`; None is what the device does not say. `error` is what ended
    the sampling early; the samples before it are kept.
    """

    started_utc: str
    interval_s: float
    duration_s: float
    nvml_s: float  # inside the driver's calls, all samples together, waits for the GIL included
    time_s: tuple[float, ...]
    used_bytes: tuple[int | None, ...]  # v2: the whole device, without the driver's reserve
    power_w: tuple[float | None, ...]
    sm_clock_hz: tuple[int | None, ...]
    memory_clock_hz: tuple[int | None, ...]
    temperature_c: tuple[int | None, ...]
    utilisation: tuple[float | None, ...]  # 0–1
    marks: tuple[Mark, ...] = ()
    error: str | None = None
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ConfigError(f"schema={shown(self.schema)} is not known: this reads {SCHEMA}")
        for name in COLUMNS:
            if len(getattr(self, name)) != len(self.time_s):
                raise ConfigError(
                    f"{name} has {len(getattr(self, name))} values for {len(self.time_s)} samples"
                )

    @property
    def cost_per_sample_s(self) -> float | None:
        """Time inside the driver's calls for one sample; None if there was none."""
        return self.nvml_s / len(self.time_s) if self.time_s else None

    @property
    def cost_fraction(self) -> float | None:
        """Share of the run that the thread was inside the driver's calls."""
        return self.nvml_s / self.duration_s if self.duration_s else None

    def phase_s(self, name: str) -> tuple[float, float]:
        """From the first mark of this name to the next mark, or to the end."""
        for index, mark in enumerate(self.marks):
            if mark.name == name:
                following = self.marks[index + 1 : index + 2]
                return mark.time_s, following[0].time_s if following else self.duration_s
        raise ConfigError(f"mark={shown(name)} was not set: {[m.name for m in self.marks]}")

    def peak_used_bytes(self, phase: str | None = None) -> int | None:
        """The highest sample of the run or of one phase; a poll may have missed higher ones."""
        start, end = self.phase_s(phase) if phase is not None else (-math.inf, math.inf)
        samples = zip(self.time_s, self.used_bytes, strict=True)
        return max((u for t, u in samples if start <= t <= end and u is not None), default=None)

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values; a column is [value, how often in a row, value, …], its equal runs once."""
        times_us = [round(t * 1e6) for t in self.time_s]
        steps = [b - a for a, b in zip([0, *times_us], times_us, strict=False)]
        return {
            "schema": self.schema,
            "started_utc": self.started_utc,
            "interval_s": self.interval_s,
            "duration_s": self.duration_s,
            "nvml_s": self.nvml_s,
            "time_steps_us": steps,
            **{name: _runs(getattr(self, name)) for name in COLUMNS},
            "marks": [[mark.name, mark.time_s] for mark in self.marks],
            "error": self.error,
        }

    @classmethod
    def from_json_dict(cls, content: Mapping[str, Any]) -> Series:
        """What `to_json_dict` wrote; ConfigError for anything else."""
        if not isinstance(content, Mapping) or content.get("schema") != SCHEMA:
            raise ConfigError(f"not a series of schema {SCHEMA}: {shown(content)}")
        values = dict(content)
        try:
            at_us, times = 0, []
            for step in values.pop("time_steps_us"):
                at_us += step
                times.append(at_us / 1e6)
            columns: dict[str, Any] = {n: tuple(_expanded(values.pop(n))) for n in COLUMNS}
            marks = tuple(Mark(name=n, time_s=t) for n, t in values.pop("marks"))
            return cls(time_s=tuple(times), marks=marks, **columns, **values)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a series: {error!r}") from None


class Sampler:
    """Samples a device from `with` to its end; `series` is there afterwards.

    Without a device there are marks and no samples, so that a caller need not ask. Whatever the
    block raises passes through, and the thread has ended by then; what goes wrong in the thread is
    `series.error`.
    """

    def __init__(
        self,
        device: NvmlDevice | None,
        *,
        interval_s: float = INTERVAL_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not (isinstance(interval_s, int | float) and 0 < interval_s < math.inf):
            raise ConfigError(f"interval_s={shown(interval_s)} is not allowed: seconds above 0")
        self._device, self._interval_s, self._clock = device, float(interval_s), clock
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._times: list[float] = []
        self._rows: list[tuple[Any, ...]] = []
        self._marks: list[Mark] = []
        self._nvml_s = 0.0
        self._error: str | None = None
        self._series: Series | None = None
        self._started = 0.0
        self._started_utc = ""

    def __enter__(self) -> Self:
        if self._started_utc:
            raise RuntimeError("a sampler samples one run")
        self._started = self._clock()
        self._started_utc = datetime.now(UTC).isoformat(timespec="microseconds")
        if self._device is not None:
            self._thread = threading.Thread(
                target=self._run, args=(self._device,), name="nvml-sampler", daemon=True
            )
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(JOIN_S)
            if self._thread.is_alive():
                self._error = f"the driver did not answer within {JOIN_S:g} s"
        self._series = self._seen()

    def mark(self, name: str) -> None:
        """Say what begins now. Synchronise the device first: its queue runs behind the host."""
        self._marks.append(Mark(name=name, time_s=self._now()))

    @property
    def series(self) -> Series:
        """What was seen; there once the `with` block has ended."""
        if self._series is None:
            raise RuntimeError("the run has not ended")
        return self._series

    def _run(self, device: NvmlDevice) -> None:
        try:
            due = self._clock()
            while True:
                self._sample(device)
                now = self._clock()
                due = max(due + self._interval_s, now)  # late samples are not made up for
                if self._stop.wait(due - now):
                    self._sample(device)  # the end of the run
                    return
        except Exception as error:  # of the driver: the run goes on without it
            self._error = f"{type(error).__name__}: {error}"

    def _sample(self, device: NvmlDevice) -> None:
        at, began = self._now(), self._clock()
        clocks = device.clocks()
        row = (
            device.memory_used_bytes(),
            device.power_w(),
            clocks.sm_hz,
            clocks.memory_hz,
            device.temperature_c(),
            device.utilisation(),
        )
        self._nvml_s += self._clock() - began
        self._rows.append(row)
        self._times.append(at)

    def _now(self) -> float:
        return round(self._clock() - self._started, 6)

    def _seen(self) -> Series:
        rows = self._rows[: len(self._times)]
        columns: dict[str, Any] = {
            name: tuple(row[i] for row in rows) for i, name in enumerate(COLUMNS)
        }
        return Series(
            started_utc=self._started_utc,
            interval_s=self._interval_s,
            duration_s=self._now(),
            nvml_s=round(self._nvml_s, 6),
            time_s=tuple(self._times[: len(rows)]),
            marks=tuple(self._marks),
            error=self._error,
            **columns,
        )


def to_json(series: Series) -> str:
    """The series as one line."""
    return json.dumps(series.to_json_dict(), separators=(",", ":"), allow_nan=False)


def cost_line(series: Series) -> str:
    """What the sampling cost, for people."""
    if series.cost_per_sample_s is None or series.cost_fraction is None:
        return "NVML: no samples"
    return (
        f"NVML: {len(series.time_s):,} samples, {series.cost_per_sample_s * 1e3:.2f} ms each, "
        f"{series.cost_fraction:.1%} of {series.duration_s:.1f} s"
        + (f"; ended early: {series.error}" if series.error else "")
    )


def _runs(column: Iterable[Any]) -> list[Any]:
    return [item for value, run in groupby(column) for item in (value, sum(1 for _ in run))]


def _expanded(runs: list[Any]) -> Iterable[Any]:
    for value, count in zip(runs[::2], runs[1::2], strict=True):
        yield from [value] * count
