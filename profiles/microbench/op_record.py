"""One timed op as an immutable record, and the JSON Lines file of a run.

A file has three kinds of lines. `environment`: what the ops after it ran on, written once a run and
named by its hash, so that six hundred records stay small. `state`: clocks, temperature and
throttling at one moment. `op`: one point. Lines are only appended, and are on disk a second after
they were measured at the latest.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from planner import ConfigError
from planner.errors import shown
from profiles.microbench.point import OpPoint
from profiles.records import Environment, UnknownSchemaError, append_lines, arguments, canonical

OP_SCHEMA = 1
SYNC_S = 1.0
DEVICE_LOST = "device lost"
"""The note of a point after which the process could not use the device any more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OpRecord:
    """Seconds of one call of an op, sample by sample, and what it had to compute and move."""

    family: str
    op: str
    shape: Mapping[str, int] = field(hash=False)
    dtype: str
    backend: str  # as asked for
    cache: Literal["cold", "warm"]
    repeat: int
    split: Literal["calibration", "held-out"]
    status: str  # "ok", "oom" or "error: …"
    flops: int
    bytes: int  # each input read once, each output written once
    environment: str  # the hash that its environment line carries
    created_utc: str
    wall_s: float  # what measuring this point took in all
    method: str | None = None  # "graph", "loop", "clock", "host", "replay", "sustained"
    samples_s: tuple[float, ...] = ()
    copies: int | None = None  # calls in one sample
    ran: str | None = None  # the backend that torch took where it was free to choose
    energy_j: float | None = None  # of one call, from a window of a second and more
    sm_clock_hz: int | None = None  # right after it
    note: str | None = None

    @property
    def key(self) -> str:
        """The name of the point that was measured: `OpPoint.key`."""
        names = ("family", "op", "shape", "dtype", "backend", "split", "cache", "repeat")
        return OpPoint(**{name: getattr(self, name) for name in names}).key

    @property
    def median_s(self) -> float | None:
        """Median of the samples; None if there is none."""
        return statistics.median(self.samples_s) if self.samples_s else None


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceState:
    """What the driver says of the device at one moment."""

    created_utc: str
    sm_clock_hz: int | None = None
    memory_clock_hz: int | None = None
    temperature_c: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    energy_j: float | None = None


Line: TypeAlias = OpRecord | DeviceState | Environment
KINDS: Mapping[str, type[Any]] = {"op": OpRecord, "state": DeviceState, "environment": Environment}


@dataclass(frozen=True, kw_only=True, slots=True)
class OpRecords:
    """What a file holds, and "file:line: why" for each line that could not be read."""

    ops: tuple[OpRecord, ...]
    states: tuple[DeviceState, ...]
    environments: Mapping[str, Environment]  # by the hash that records carry
    problems: tuple[str, ...]

    def done(self, on: Environment) -> set[str]:
        """Keys of the points measured well on a device of this name with this version of torch.

        One that took the device down with it is not tried again either.
        """
        same = {
            name
            for name, known in self.environments.items()
            if (known.device_name, known.torch) == (on.device_name, on.torch)
        }
        over = [r for r in self.ops if r.status == "ok" or r.note == DEVICE_LOST]
        return {record.key for record in over if record.environment in same}


def environment_hash(environment: Environment) -> str:
    """What an op record names its environment by."""
    return hashlib.sha256(canonical(asdict(environment)).encode()).hexdigest()[:12]


def to_json(line: Line) -> str:
    """One line of the file, without the newline."""
    kind = next(kind for kind, of in KINDS.items() if isinstance(line, of))
    content: dict[str, Any] = {"kind": kind, "schema": OP_SCHEMA}
    if isinstance(line, Environment):
        content |= {"id": environment_hash(line), **asdict(line)}
    else:
        content |= {name: value for name, value in asdict(line).items() if value is not None}
    if isinstance(line, OpRecord):
        content["samples_s"] = [float(f"{sample:.5g}") for sample in line.samples_s]
        content["wall_s"] = round(line.wall_s, 4)
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def from_json(text: str) -> Line:
    """What a line says; ConfigError names the field that is wrong."""
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"not a JSON record: {error}") from None
    if not isinstance(content, dict) or "schema" not in content or "kind" not in content:
        raise ConfigError(f"not an op record: {shown(content)}")
    schema, kind = content.pop("schema"), content.pop("kind")
    if schema != OP_SCHEMA or kind not in KINDS:
        raise UnknownSchemaError(
            f"schema={shown(schema)}, kind={shown(kind)} is not known: this reads {OP_SCHEMA}, "
            f"{', '.join(KINDS)}"
        )
    if kind == "environment":
        content.pop("id", None)
    line: Line = KINDS[kind](**arguments(KINDS[kind], content, where=""))
    return line


def load(path: Path | str) -> OpRecords:
    """Every line of a file that can be read. An unknown schema raises: half an answer is none."""
    ops: list[OpRecord] = []
    states: list[DeviceState] = []
    environments: dict[str, Environment] = {}
    problems: list[str] = []
    lines = Path(path).read_bytes().split(b"\n") if Path(path).exists() else []
    for number, content in enumerate(lines, start=1):
        if not content.strip():
            continue
        try:
            line = from_json(content.decode())
        except UnknownSchemaError as error:
            raise ConfigError(f"{path}:{number}: {error}") from None
        except ValueError as error:
            torn = "a torn last line, skipped: " if number == len(lines) else ""
            problems.append(f"{path}:{number}: {torn}{error}")
            continue
        match line:
            case OpRecord():
                ops.append(line)
            case DeviceState():
                states.append(line)
            case Environment():
                environments[environment_hash(line)] = line
    return OpRecords(
        ops=tuple(ops),
        states=tuple(states),
        environments=environments,
        problems=tuple(problems),
    )


class Writer:
    """Appends lines, synced to disk about once a second and when it closes."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._lines: list[str] = []
        self._synced = time.monotonic()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def write(self, line: Line) -> None:
        """Keep a line; it is on disk a second later at the latest, if others follow."""
        self._lines.append(to_json(line))
        if time.monotonic() - self._synced >= SYNC_S:
            self.flush()

    def flush(self) -> None:
        """All lines on disk."""
        lines, self._lines = self._lines, []
        if lines:
            append_lines(self.path, lines)
        self._synced = time.monotonic()


def merged(records: Iterable[OpRecord]) -> dict[str, OpRecord]:
    """The last good record of every point, by key; where none is good, the last."""
    found: dict[str, OpRecord] = {}
    for record in records:
        kept = found.get(record.key)
        if kept is None or record.status == "ok" or kept.status != "ok":
            found[record.key] = record
    return found
