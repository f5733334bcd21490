"""A suite, run within a budget: each point in a process of its own, its record on disk at once.

Points are taken in the suite's order, the most valuable first, so that a cut-short run is useful;
what the file already has from this device is not measured again where only the missing is wanted.
A crash, a hang or a lack of memory becomes the record of its point. Several GPUs take points side
by side. A lock for each device keeps a second profiler away.
"""

from __future__ import annotations

import fcntl
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import planner
from planner import ConfigError
from planner.format import gib
from profiles import environment, nvml, records
from profiles.isolated import Ended, run_isolated
from profiles.points import SuitePoint, planned_dtype
from profiles.records import DEFAULT_OUT, Record
from profiles.suites import suite_points

POINT_TIMEOUT_S = 180.0

Report = Callable[["Progress"], None]

Measure = Callable[[SuitePoint, str, str, int, str], Record]
"""(point, suite, "cuda" or "cpu", torch's index, folder for histories or "") → its record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run stands. `what` comes next or, with a record, has just ended."""

    done: int
    total: int
    elapsed_s: float
    what: str
    record: Record | None = None

    @property
    def eta_s(self) -> float | None:
        """Seconds to the end at the pace so far; None before the first point."""
        return self.elapsed_s / self.done * (self.total - self.done) if self.done else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run did: its records, and why other points have none."""

    records: tuple[Record, ...]
    skipped: tuple[str, ...]


def run_suite(
    name: str,
    *,
    device: str = "auto",
    out: Path | str = DEFAULT_OUT,
    budget_s: float | None = None,
    only_missing: bool = False,
    point_timeout_s: float = POINT_TIMEOUT_S,
    on_progress: Report = lambda progress: None,
) -> Run:
    """Measure the points of a suite, as `run_points` does; ConfigError for an unknown one."""
    return run_points(
        name,
        suite_points(name),
        device=device,
        out=out,
        budget_s=budget_s,
        only_missing=only_missing,
        point_timeout_s=point_timeout_s,
        on_progress=on_progress,
    )


def run_points(
    name: str,
    points: Sequence[SuitePoint],
    *,
    device: str = "auto",
    out: Path | str = DEFAULT_OUT,
    budget_s: float | None = None,
    only_missing: bool = False,
    point_timeout_s: float = POINT_TIMEOUT_S,
    on_progress: Report = lambda progress: None,
    measure: Measure | None = None,
) -> Run:
    """Measure points of suite `name`: none begins after the budget's end, none outlasts it.

    `measure` is a module's function, called in a process of its own. Raises ConfigError for an
    unknown device, for a file that cannot be written, and where another profiler is at work on the
    device.
    """
    looked = run_isolated(look, (device,), timeout_s=POINT_TIMEOUT_S)
    if looked.problem is not None:
        raise ConfigError(looked.problem.removeprefix("ConfigError: "))
    lanes: list[Lane] = looked.answer
    kind = lanes[0].environment.device
    records.check_writable(out)
    with ExitStack() as stack:
        for lane in lanes:
            stack.enter_context(_locked(lane.environment.device_uuid or kind))
        work = _Work(
            name, kind, Path(out), budget_s, point_timeout_s, on_progress, measure or measured_point
        )
        work.take(points, lanes, only_missing=only_missing)
        work.run(lanes)
    return Run(records=tuple(work.records), skipped=tuple(work.skipped))


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """A device, by torch's index, as a process that has looked at it describes it."""

    index: int
    environment: records.Environment
    free_bytes: int


class _Work:
    """The points that wait, shared by the lanes."""

    def __init__(
        self,
        suite: str,
        kind: str,
        out: Path,
        budget_s: float | None,
        point_timeout_s: float,
        on_progress: Report,
        measure: Measure,
    ) -> None:
        self._measure = measure
        self._suite, self._kind, self._out = suite, kind, out
        self._started_s, self._budget_s = time.monotonic(), budget_s
        self._point_timeout_s, self._report = point_timeout_s, on_progress
        self._histories = str(out.parent / "histories")
        self._waiting: queue.SimpleQueue[SuitePoint] = queue.SimpleQueue()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._total = self._done = 0
        self.records: list[Record] = []
        self.skipped: list[str] = []

    def take(
        self, points: Sequence[SuitePoint], lanes: Sequence[Lane], *, only_missing: bool
    ) -> None:
        """Queue what is to be measured; say why the rest is not."""
        lane = lanes[0]
        measured = _measured(self._out, self._suite, lane.environment) if only_missing else set()
        for point in points:
            if point.name in measured:
                self.skipped.append(f"{point.name}: measured before")
            elif (reason := _does_not_fit(point, lane)) is not None:
                self.skipped.append(f"{point.name}: {reason}")
            else:
                self._waiting.put(point)
                self._total += 1

    def run(self, lanes: Sequence[Lane]) -> None:
        """Work until nothing waits, the budget is used up, or an interrupt."""
        others = [threading.Thread(target=self._lane, args=(lane,)) for lane in lanes[1:]]
        for thread in others:
            thread.start()
        try:
            self._lane(lanes[0])
        finally:
            self._stop.set()
            for thread in others:
                thread.join()

    def _lane(self, lane: Lane) -> None:
        while not self._stop.is_set():
            try:
                point = self._waiting.get_nowait()
            except queue.Empty:
                return
            left_s = self._left_s()
            if left_s <= 0:
                self.skipped.append(f"{point.name}: the budget was used up")
                continue
            self._tell(point.name)
            cut_short = left_s < self._point_timeout_s
            timeout_s = left_s if cut_short else self._point_timeout_s
            ended = run_isolated(
                self._measure,
                (point, self._suite, self._kind, lane.index, self._histories),
                timeout_s=timeout_s,
            )
            if cut_short and ended.timed_out:  # no fault of the point's
                self.skipped.append(f"{point.name}: the budget was used up")
            else:
                self._note(point, lane, ended)

    def _note(self, point: SuitePoint, lane: Lane, ended: Ended) -> None:
        record = ended.answer
        if record is None:
            status = f"error: {ended.problem}"
            record = unmeasured(point, self._suite, status, lane.environment)
        with self._lock:
            records.append(self._out, record)
            self.records.append(record)
            self._done += 1
        self._tell(point.name, record)

    def _tell(self, what: str, record: Record | None = None) -> None:
        elapsed_s = time.monotonic() - self._started_s
        self._report(
            Progress(
                done=self._done, total=self._total, elapsed_s=elapsed_s, what=what, record=record
            )
        )

    def _left_s(self) -> float:
        if self._budget_s is None:
            return float("inf")
        return self._budget_s - (time.monotonic() - self._started_s)


def measured_point(
    point: SuitePoint, suite: str, device: str, index: int, histories: str
) -> Record:
    """What worker.measure does; asked of a process of its own."""
    from profiles.worker import measure

    folder = Path(histories) if histories else None
    return measure(point, suite=suite, device=device, index=index, histories=folder)


def look(device: str) -> list[Lane]:
    """The devices of that kind; asked of a process of its own, for it makes a CUDA context."""
    import torch

    target = environment.find_device(device)
    cuda = target.type == "cuda"
    lanes = []
    for index in range(torch.cuda.device_count() if cuda else 1):
        here = torch.device("cuda", index) if cuda else target
        uuid = environment.device_uuid(here)
        with nvml.open_device(uuid) if uuid else nullcontext() as driver:
            described = environment.describe(here, driver)
        free_bytes = environment.free_bytes(here)
        lanes.append(Lane(index=index, environment=described, free_bytes=free_bytes))
    return lanes


def unmeasured(point: SuitePoint, suite: str, status: str, like: records.Environment) -> Record:
    """The record of a point whose process gave no answer."""
    from profiles import worker

    return worker.unmeasured(point, suite=suite, status=status, like=like)


def _measured(out: Path, suite: str, here: records.Environment) -> set[str]:
    """The points of this suite that the file has from a device of this name, with this torch."""
    if not out.exists():
        return set()
    stored, _ = records.load([out])
    return {
        record.point
        for record in stored
        if record.point is not None
        and record.suite == suite
        and record.status in ("ok", "oom")
        and (record.environment.device_name, record.environment.torch)
        == (here.device_name, here.torch)
    }


def _does_not_fit(point: SuitePoint, lane: Lane) -> str | None:
    """Why a point would only fail here; an OOM ends one process on a GPU, but a CPU's machine."""
    if lane.environment.device != "cuda" and getattr(point.run, "mode", "eager") == "graph":
        return "a CUDA graph needs a GPU"
    try:
        needed_bytes = needed(point, lane.environment.gpu).memory.peak_live_bytes
    except ConfigError:  # not predicted: all the more worth measuring, where that is safe
        return None if lane.environment.device == "cuda" else "its memory is not predicted"
    if needed_bytes <= lane.free_bytes:
        return None
    return f"needs {gib(needed_bytes)}, {gib(lane.free_bytes)} available"


def needed(point: SuitePoint, gpu: str | None) -> planner.Estimate:
    """The planner's estimate of a point; ConfigError where it has none."""
    deploy = planner.Deployment(
        gpu=gpu or "cpu",
        runtime=point.runtime,
        attention=point.attention,
        dtype=planned_dtype(point.run.work, point.dtype),
        kv_dtype=point.kv_dtype,
        cache=point.cache,
        weight_dtype=getattr(point.run, "weight_dtype", None),
        mode="eager",
    )
    return planner.estimate(planner.load_model(point.source), point.run.work, deploy)


@contextmanager
def _locked(device: str) -> Iterator[None]:
    """Alone on a device: a lock that the system gives back when this process ends, however."""
    path = Path(tempfile.gettempdir()) / f"planner-profile-{device}.lock"
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"device={device} is being measured by another profiler ({path} is locked)"
            ) from None
        yield
