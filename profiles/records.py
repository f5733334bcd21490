"""One measurement as a typed, complete, immutable record, and the file it is kept in.

A store is JSON Lines, append-only: one record a line, flushed and synced before `append` returns,
so that a crash costs at most the record being written. A line is never edited; what is wrong in a
file is reported with its place, and the rest of the file is still read.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from planner import ConfigError
from planner.errors import check_choice, check_size, shown

T = TypeVar("T")

SCHEMA = 3
KNOWN_SCHEMAS = (1, 2, 3)
"""2 added the phase "training" and what belongs to it, 3 caches other than the runtime's own and
padding; older records are read as they are: they have none of these."""

READS = ", ".join(map(str, KNOWN_SCHEMAS))

PHASES = ("prefill", "decode", "generation", "training")
SPLITS = ("calibration", "held-out")

WARMUP_STEPS = 2
"""Decode steps of the warm-up before a generation's timed passes: a prefill comes before."""

DATA = Path(__file__).parent / "data"
DEFAULT_OUT = Path("measurements") / "records.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """What a measurement ran on. Unknown, or absent on this kind of device, is None."""

    device: Literal["cuda", "cpu"]
    device_name: str  # as torch or the operating system names it
    gpu: str | None  # planner's short name ("h200", "cpu"); None: not in the catalogue
    platform: str
    python: str
    torch: str
    total_memory_bytes: int
    device_uuid: str | None = None
    driver: str | None = None
    cuda: str | None = None
    triton: str | None = None
    transformers: str | None = None
    cpu: str | None = None
    cpu_threads: int | None = None  # those torch computes with
    sm_clock_hz: int | None = None
    memory_clock_hz: int | None = None
    git_commit: str | None = None  # with "+dirty" where the tree had changes

    def __post_init__(self) -> None:
        check_choice("environment.device", self.device, ("cuda", "cpu"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One measured phase of one workload.

    `prefill`     the pass over the prompt that yields the first token: output_tokens is 1.
    `decode`      one-token steps after a prefill that is not timed; the last of them attends over
                  context_tokens = prompt_tokens + output_tokens − 1. Its memory belongs to the
                  generation of the same shape and stays None, weights and cache apart.
    `generation`  prefill and output_tokens − 1 decode steps, as a caller waits for them.
    `training`    steps over batch × prompt_tokens, labels given: what `step` says of them.

    Raw samples are kept, statistics are derived. Unknown is None.
    """

    id: str
    created_utc: str
    status: str  # "ok", "oom" or "error: …"
    model: str
    config: Mapping[str, Any] = field(hash=False)  # config.json of the model
    config_hash: str
    runtime: str
    runtime_version: str | None
    attention: str | None  # what was asked for and what ran: "naive", "sdpa:flash"
    phase: Literal["prefill", "decode", "generation", "training"]
    batch: int
    prompt_tokens: int
    output_tokens: int
    dtype: str
    kv_dtype: str  # what keys and values are kept in
    logits: Literal["last", "all"]  # what a prefill returns
    mode: Literal["eager", "graph"]  # how steps are launched
    environment: Environment
    schema: int = SCHEMA
    suite: str | None = None
    split: Literal["calibration", "held-out"] | None = None
    point: str | None = None  # the name that the point has in its suite
    step: Mapping[str, Any] | None = (
        None  # training: planner.Training's fields beside the sizes, dropout
    )
    cache: Mapping[str, Any] | None = None  # of planner.CacheSpec; None: the runtime's own
    padded: bool = False  # prompts of several lengths, padded on the left
    experts: str | None = None  # what multiplied a mixture's experts, as far as the runtime says it
    context_tokens: int | None = None  # KV length at the last decode step; None for prefill
    # time, device-synchronised
    warmup_steps: int | None = None  # passes (decode: steps) before the first timed one
    step_s: tuple[float, ...] = ()  # prefill, training: every pass; else every decode step
    ttft_s: tuple[float, ...] = ()  # generation: the first token of every repeat
    # memory
    weights_bytes: int | None = None  # parameters (tied once) and buffers, from the live module
    kv_cache_bytes: int | None = None  # from the live cache tensors at the end of the pass
    gradients_bytes: int | None = None  # training: of the live `.grad`s before the optimizer
    optimizer_bytes: int | None = None  # training: of the optimizer's live states
    peak_live_bytes: int | None = None  # weights + peak of storages created by the pass
    peak_op: str | None = None  # the op that reached it
    peak_allocated_bytes: int | None = None  # torch: blocks in use
    peak_reserved_bytes: int | None = None  # torch: segments of the caching allocator
    peak_requested_bytes: int | None = None  # torch: blocks before rounding
    device_used_before_bytes: int | None = None  # NVML, before this process touched the device
    device_used_peak_bytes: int | None = None  # NVML, after the pass, its segments still held
    device_used_after_bytes: int | None = None  # NVML, quiet: the cached segments given back
    device_reserve_bytes: int | None = None  # NVML: the driver's own, in none of the three above
    host_add_s: tuple[float, ...] = ()  # of an addition's issue, before each of ttft_s and step_s
    energy_j: float | None = None  # over the timed passes, where they took ≥ 1 s
    throttle_reasons: tuple[str, ...] | None = None
    series: Mapping[str, Any] | None = None  # NVML from load on, as profiles/sampler.py writes it
    history: str | None = None  # the allocator's, a file beside this one in histories/

    def __post_init__(self) -> None:
        if self.schema not in KNOWN_SCHEMAS:
            raise ConfigError(f"schema={shown(self.schema)} is not known: this reads {READS}")
        check_choice("phase", self.phase, PHASES)
        check_choice("logits", self.logits, ("last", "all"))
        check_choice("mode", self.mode, ("eager", "graph"))
        if self.split is not None:
            check_choice("split", self.split, SPLITS)
        if self.status not in ("ok", "oom") and not self.status.startswith("error: "):
            raise ConfigError(
                f'status={shown(self.status)} is not allowed: "ok", "oom" or "error: …"'
            )
        for name in ("batch", "prompt_tokens", "output_tokens"):
            check_size(name, getattr(self, name))

    @property
    def is_plain(self) -> bool:
        """Whether nothing was padded and the runtime's own cache kept what was computed."""
        return self.cache is None and not self.padded and self.kv_dtype == self.dtype

    @property
    def median_step_s(self) -> float | None:
        """Median of the timed steps; None if none was timed."""
        return statistics.median(self.step_s) if self.step_s else None

    @property
    def median_ttft_s(self) -> float | None:
        """Median time to the first token: of the passes of a prefill, of a generation's repeats."""
        samples = self.step_s if self.phase == "prefill" else self.ttft_s
        return statistics.median(samples) if samples else None

    @property
    def repeat_tpot_s(self) -> tuple[float, ...]:
        """The mean time of a token after the first, of each repeat (generation).

        Without a repeat that met its lengths for the first time, where others follow it.
        """
        return tuple(statistics.fmean(steps) for steps in self._repeats(self.step_s))

    @property
    def median_tpot_s(self) -> float | None:
        """Median of `repeat_tpot_s`."""
        return statistics.median(self.repeat_tpot_s) if self.repeat_tpot_s else None

    @property
    def _first_is_new(self) -> bool:
        """Whether no pass for memory came before a generation's timed ones (suite host)."""
        timed_alone = self.peak_live_bytes is None and len(self.ttft_s) > 1
        return timed_alone and self.reads_host_each_step

    @property
    def reads_host_each_step(self) -> bool:
        """Whether the host's speed was read right before every timed pass and step; until
        2026-11-27 it was read before and after them all.
        """
        steps = len(self.ttft_s) + len(self.step_s)
        return len(self.host_add_s) == steps > 0

    def _repeats(self, steps: tuple[T, ...]) -> Iterator[tuple[T, ...]]:
        size = self.output_tokens - 1
        if self.phase == "generation" and size:
            for start in range(size if self._first_is_new else 0, len(steps), size):
                yield steps[start : start + size]

    def samples(self, quantity: str) -> tuple[tuple[float, float | None], ...]:
        """Every timed pass of "ttft_s" or step of "tpot_s" (those of `repeat_tpot_s`), and what an
        addition cost the host right before it.

        "new_tpot_s": steps at lengths that no pass had met, which hold what a backend prepares for
        each length; the first few were met in a warm-up. Where the host was read only before and
        after them all, the median of that; None where it was not read.
        """
        firsts, size = len(self.ttft_s), self.output_tokens - 1
        adds: tuple[float | None, ...] = self.host_add_s
        if not self.reads_host_each_step:
            usual = statistics.median(self.host_add_s) if adds else None
            adds = (usual,) * (firsts + len(self.step_s))
        pairs = tuple(zip((*self.ttft_s, *self.step_s), adds, strict=True))
        if self.phase != "generation":
            return () if quantity == "new_tpot_s" else pairs
        steps = pairs[firsts:]
        match quantity:
            case "ttft_s":
                return pairs[:firsts]
            case "new_tpot_s":
                return steps[WARMUP_STEPS:size] if self._first_is_new else ()
        return tuple(pair for repeat in self._repeats(steps) for pair in repeat)

    @property
    def new_tpot_s(self) -> float | None:
        """Mean time of a token at lengths that are new to its process; None: none was timed."""
        steps = [step for step, _ in self.samples("new_tpot_s")]
        return statistics.fmean(steps) if steps else None

    def host_add_beside_s(self, quantity: str) -> float | None:
        """What an addition cost the host while a quantity was measured, as the quantity itself is
        taken: the median of passes; the mean of the steps of a repeat, of repeats the median. None:
        unknown.
        """
        adds = tuple(add_s for _, add_s in self.samples(quantity) if add_s is not None)
        if not adds:
            return None
        if quantity == "new_tpot_s":
            return statistics.fmean(adds)
        size = self.output_tokens - 1
        if quantity != "tpot_s" or self.phase != "generation" or not size:
            return statistics.median(adds)
        repeats = (adds[start : start + size] for start in range(0, len(adds), size))
        return statistics.median(map(statistics.fmean, repeats))


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 of the config's canonical JSON: equal for equal content, whatever the key order."""
    return hashlib.sha256(canonical(config).encode()).hexdigest()


def create(*, config: Mapping[str, Any], **values: Any) -> Record:
    """A record of this moment: adds created_utc, config_hash and an id of content and time."""
    values |= {
        "config": dict(config),
        "config_hash": config_hash(config),
        "created_utc": datetime.now(UTC).isoformat(timespec="microseconds"),
    }
    record = Record(id="", **values)
    content = {**asdict(record), "process": os.getpid()}
    identity = hashlib.sha256(canonical(content).encode()).hexdigest()[:12]
    return Record(id=identity, **values)


def to_json(record: Record) -> str:
    """The record as one line of JSON, without the newline."""
    return json.dumps(asdict(record), ensure_ascii=False, allow_nan=False)


def from_json(line: str) -> Record:
    """The record of one line; ConfigError says which field is wrong."""
    try:
        content = json.loads(line, parse_constant=_refuse_constant)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"not a JSON record: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"not a record: {shown(content)} is no JSON object")
    if "schema" not in content:
        raise ConfigError("field schema is missing")
    if content["schema"] not in KNOWN_SCHEMAS:
        raise UnknownSchemaError(
            f"schema={shown(content['schema'])} is not known: this version reads {READS}"
        )
    return Record(**arguments(Record, content, where=""))


class UnknownSchemaError(ConfigError):
    """A record written by a version that this one cannot read."""


def check_writable(path: Path | str) -> None:
    """ConfigError unless records can be appended here: ask before an hour of measuring."""
    try:
        with _open(Path(path)):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None


def _open(path: Path) -> FileIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    return open(path, "a+b", buffering=0)


def append(path: Path | str, record: Record) -> None:
    """Add a record to the store: on disk when this returns, apart from a torn line before it."""
    append_lines(path, [to_json(record)])


def append_lines(path: Path | str, lines: Iterable[str]) -> None:
    """Add lines to a JSON Lines file, flushed and synced."""
    content = "".join(f"{line}\n" for line in lines).encode()
    with _open(Path(path)) as store:
        if store.seek(0, os.SEEK_END):
            store.seek(-1, os.SEEK_END)
            if store.read(1) != b"\n":  # a writer was killed in the middle of a line
                content = b"\n" + content
        _write_all(store.fileno(), content)
        os.fsync(store.fileno())


def load(paths: Iterable[Path | str]) -> tuple[list[Record], list[str]]:
    """Every readable record of these files in order, and "file:line: why" for each that is not.

    A record that is in two files (the same id) counts once. An unknown `schema` raises ConfigError:
    to skip what a newer version wrote would be to answer from half of the measurements.
    """
    records: dict[str, Record] = {}
    problems: list[str] = []
    for path in paths:
        try:
            lines = Path(path).read_bytes().split(b"\n")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
            continue
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = from_json(line.decode())
            except UnknownSchemaError as error:
                raise ConfigError(f"{path}:{number}: {error}") from None
            except ValueError as error:  # ConfigError, UnicodeDecodeError, absurd numbers
                torn = "a torn last line, skipped: " if number == len(lines) else ""
                problems.append(f"{path}:{number}: {torn}{error}")
            else:
                records.setdefault(record.id, record)
    return list(records.values()), problems


def default_paths() -> list[Path]:
    """The committed records, then those measured under the current directory."""
    return [*sorted(DATA.glob("*.jsonl")), *sorted(DEFAULT_OUT.parent.glob("*.jsonl"))]


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def canonical(content: Mapping[str, Any]) -> str:
    """The one JSON text of this content, whatever the order of its keys."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _refuse_constant(name: str) -> None:
    raise ConfigError(f"{name} is not a value a record may have: unknown is null")


def arguments(kind: type, content: dict[str, Any], *, where: str) -> dict[str, Any]:
    """A record type's constructor arguments out of JSON, each checked against its annotation."""
    required, hints = _fields_of(kind)
    if extra := sorted(content.keys() - hints.keys()):
        raise ConfigError(f"unknown field {where}{extra[0]}: the schema has no such field")
    if missing := [name for name in required if name not in content]:
        raise ConfigError(f"field {where}{missing[0]} is missing")
    return {name: _value(hints[name], value, where + name) for name, value in content.items()}


@cache
def _fields_of(kind: type) -> tuple[list[str], dict[str, Any]]:
    """The fields without a default, and the annotation of every field."""
    required = [f.name for f in fields(kind) if f.default is MISSING]
    return required, get_type_hints(kind)


def _value(hint: Any, value: Any, name: str) -> Any:
    """`value` as its annotation wants it: lists become tuples, objects become Environment."""
    for option in get_args(hint) if type(None) in get_args(hint) else (hint,):
        origin = get_origin(option) or option
        if option is type(None) and value is None:
            return None
        if origin is Literal and value in get_args(option):
            return value
        if origin is tuple and isinstance(value, list):
            return tuple(_value(get_args(option)[0], item, name) for item in value)
        if origin is Environment and isinstance(value, dict):
            return Environment(**arguments(Environment, value, where=f"{name}."))
        if origin is Mapping and isinstance(value, dict):
            return value
        if origin in (str, bool) and isinstance(value, origin):
            return value
        if origin is int and type(value) is int and value >= 0:
            return value
        if origin is float and type(value) in (int, float) and 0 <= value <= sys.float_info.max:
            return float(value)
    expected = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ConfigError(f"{name}={shown(value)} is not allowed: expected {expected}")
