"""Measurements → planner/catalog/calibration/<gpu>.json: what `planner calibrate` does.

Ops come from our own records (profiles/microbench), from the tables in aiconfigurator-core, or from
both: where both have a family, each keeps its own fit, records without a backend's name and tables
as ":vllm". Only calibration rows are fitted. Of end-to-end records nothing is fitted but one factor
an engine on what the host needs, from the two rows that are named as calibration.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from planner import ConfigError
from planner.catalog.gpus import Gpu, gpu_named
from planner.errors import shown
from planner.timing.calibration import SCHEMA
from planner.timing.fresh_pages import MAPPED_FROM_BYTES
from planner.timing.op_families import (
    COMMUNICATION,
    CUMSUM_DOWN,
    OFFSETS,
    WEIGHT_BYTES,
)
from planner.timing.op_kinds import kernel_count
from planner.timing.op_times import Fit, family_named
from profiles import composites
from profiles.compare import passes_of_record
from profiles.fitting import Samples, fit_family
from profiles.host_costs import host_part
from profiles.microbench.op_record import OpRecord, OpRecords
from profiles.op_samples import HALF, is_given_anew, joined, samples_of_records
from profiles.op_tables import Tables
from profiles.records import Record

POINTS: Mapping[str, int] = {
    "gemm:bf16": 800,
    "gemm:fp8": 400,
    "decode:bf16": 800,
    "decode:fp8": 400,
    "prefill:bf16": 600,
    "grouped:bf16": 400,
}
"""Calibration rows that a fit may take: more of what most time goes into."""
OTHER_POINTS = 100
LAUNCHED: Mapping[str, tuple[float, int] | tuple[float, int, float]] = {
    "convolution": (4.0, 2),
    CUMSUM_DOWN: (8.0, 1, 1.0),
}
"""Ops that were timed at large sizes alone: bytes of an element, kernels, least further sizes."""
EFFICIENT = "prefill:bf16:efficient"
COMPUTES = 400
"""FLOPs for a byte: with more a product computes longer than it moves, on any GPU there is."""
LARGEST_FILE_BYTES = 200_000
BEST = 1.1
"""A CPU's ceilings are taken to be so much above the best that was seen of it."""
PAGE_BYTES = 4096

RECORDS_SOURCE = {
    "name": "profiles/data/microbench",
    "version": "1",
    "licence": "Apache-2.0",
    "url": "profiles/microbench",
}
TABLES_SOURCE = {
    "name": "aiconfigurator-core",
    "licence": "Apache-2.0",
    "url": "https://pypi.org/project/aiconfigurator-core/",
}

Tell = Callable[[str, int, Fit], None]


def calibration(
    gpu_name: str,
    *,
    records: OpRecords | None = None,
    tables: Tables | None = None,
    end_to_end: Iterable[Record] = (),
    tell: Tell | None = None,
) -> dict[str, Any]:
    """The file's content."""
    gpu = gpu_named(gpu_name)
    fits, sources = dict[str, dict[str, Any]](), dict[str, dict[str, str]]()
    found: dict[str, tuple[str, Samples]] = {}
    if records is not None:
        ops = _of_gpu(records, gpu_name)
        sources["records"] = {**RECORDS_SOURCE, "what": _where(records, ops)}
        by_name = samples_of_records(ops, cpu=gpu.is_cpu, multiprocessors=gpu.multiprocessors)
        for name, samples in by_name.items():
            found[name] = ("records", samples)
    if tables is not None:
        sources["tables"] = {
            **TABLES_SOURCE,
            "version": tables.version,
            "what": f"op latencies of {tables.measured_with}",
        }
        for name, samples in tables.samples.items():
            twice = name in found and not name.endswith(":vllm")
            found[f"{name}:vllm" if twice else name] = ("tables", samples)
    if not found:
        raise ConfigError(f"gpu={shown(gpu_name)}: nothing was measured of it")
    made = dict[str, Fit]()

    def fitted(name: str, source: str, samples: Samples) -> None:
        if samples.held_out.all():
            return
        made[name] = _fit(name, samples, gpu, source)
        found[name] = (source, samples)

    for name, (source, samples) in list(found.items()):
        fitted(name, source, samples)
    if records is not None:
        _parts_of_composites(ops, found, made, fitted, gpu)
    for name, fit in sorted(made.items()):
        fits[name] = _entry(fit)
        if tell is not None:
            tell(name, len(found[name][1]), fit)
    content: dict[str, Any] = {"schema": SCHEMA, "gpu": gpu_name, "sources": sources, "fits": fits}
    if records is not None:
        content |= {
            **_graph(ops, [r for r in end_to_end if r.environment.gpu == gpu_name]),
            **_energy(ops),
            **_half(ops),
            **host_part(ops, gpu, list(end_to_end)),
        }
        if gpu.is_cpu:
            content |= {**_machine(records, ops), **_pages(records, ops)}
    return content


def _parts_of_composites(
    ops: list[OpRecord],
    found: Mapping[str, tuple[str, Samples]],
    made: Mapping[str, Fit],
    fitted: Callable[[str, str, Samples], None],
    gpu: Gpu,
) -> None:
    """Kinds that were timed among others, one after the other: each takes those before as known."""
    needed = ("elementwise",) if gpu.is_cpu else ("elementwise", OFFSETS)
    if not all(name in made for name in needed):
        return
    if gpu.is_cpu:
        ops = [op for op in ops if not is_given_anew(op)]

    def more(name: str, rows: composites.Rows) -> None:
        before = found[name][1] if name in found else None
        samples = joined(before, rows)
        if samples is not None:
            fitted(name, "records", samples)

    more("cast", composites.launches(ops, 6.0))
    for name, sizes in LAUNCHED.items():
        if name in made:
            more(name, composites.launches(ops, *sizes))
    if EFFICIENT in made:
        more(EFFICIENT, composites.one_queries(ops, gpu))
    more("mean", composites.means(ops, made, gpu))
    if not gpu.is_cpu:  # which has no kernels of its own for them
        more(OFFSETS, composites.products(ops, made, gpu))
    more("softmax", composites.softmaxes(ops, made, gpu))


def write(content: Mapping[str, Any], path: Path) -> int:
    """The file, a fit a line; its bytes. ConfigError where it grew beyond what is committed."""
    head = {name: value for name, value in content.items() if name != "fits"}
    lines = [
        f'"{name}": {json.dumps(value, separators=(",", ":"))}' for name, value in head.items()
    ]
    fits = ",\n".join(
        f'"{name}": {json.dumps(value, separators=(",", ":"))}'
        for name, value in content["fits"].items()
    )
    text = "{\n" + ",\n".join(lines) + ',\n"fits": {\n' + fits + "\n}}\n"
    size = len(text.encode())
    if size > LARGEST_FILE_BYTES:
        raise ConfigError(f"{path.name} would have {size:,} bytes: at most {LARGEST_FILE_BYTES:,}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return size


def _fit(name: str, samples: Samples, gpu: Gpu, source: str) -> Fit:
    family, *rest = name.split(":")
    dtype = rest[0] if rest and rest[0] in WEIGHT_BYTES else ""
    if family in COMMUNICATION:
        family, dtype = ":".join(name.split(":")[:2]), ""
    points = POINTS.get(":".join(name.split(":")[:2]), OTHER_POINTS)
    peak, bandwidth = gpu.flops_per_s(dtype or "bf16"), gpu.memory_bandwidth_bytes_per_s
    if gpu.is_cpu:  # which one it is, the catalogue does not know
        flops, moved = family_named(family).work(*samples.sizes.T, dtype)
        peak = max(1e9, BEST * float((flops / samples.seconds).max()))
        bandwidth = max(1e8, BEST * float((moved / samples.seconds).max()))
    return fit_family(
        family_named(family),
        dtype,
        samples,
        peak=peak,
        bandwidth=bandwidth,
        source=source,
        points=points,
    )


def _entry(fit: Fit) -> dict[str, Any]:
    return {
        "source": fit.source,
        "peak_flops_per_s": fit.peak_flops_per_s,
        "bandwidth_bytes_per_s": fit.bandwidth_bytes_per_s,
        "roof": asdict(fit.roof),
        "held_out": None if fit.held_out is None else asdict(fit.held_out),
        "points": [[_short(x) for x in row] for row in fit.points.tolist()],
        "weights": fit.weights.tolist(),
    }


def _short(x: float) -> float | int:
    return int(x) if x == int(x) else round(x, 3)


def _of_gpu(records: OpRecords, gpu_name: str) -> list[OpRecord]:
    """The ops that were measured on this GPU; of CPUs, those on the last one."""
    theirs = {name: e for name, e in records.environments.items() if e.gpu == gpu_name}
    ops = [op for op in records.ops if op.environment in theirs]
    if not ops:
        raise ConfigError(f"gpu={shown(gpu_name)}: no op record is of it")
    last = theirs[ops[-1].environment]
    if last.device != "cpu":
        return ops
    same = {n for n, e in theirs.items() if (e.cpu, e.cpu_threads) == (last.cpu, last.cpu_threads)}
    return [op for op in ops if op.environment in same]


def _where(records: OpRecords, ops: list[OpRecord]) -> str:
    environment = records.environments[ops[0].environment]
    day = min(op.created_utc for op in ops)[:10]
    threads = f", {environment.cpu_threads} threads" if environment.device == "cpu" else ""
    where = f"{environment.device_name}{threads}"
    return f"{len(ops)} ops on {where}, torch {environment.torch}, {day}"


def _machine(records: OpRecords, ops: list[OpRecord]) -> dict[str, Any]:
    """Which CPU was timed, with how many threads."""
    environment = records.environments[ops[-1].environment]
    threads = environment.cpu_threads or 1
    return {"machine": {"name": environment.cpu or environment.device_name, "threads": threads}}


def _pages(records: OpRecords, ops: list[OpRecord]) -> dict[str, Any]:
    """What a page costs that the system gives anew: a copy into mapped memory against the best rate
    of copies into memory at hand. glibc alone is known to map and to keep as fresh_pages.py has it.
    """
    if "glibc" not in records.environments[ops[-1].environment].platform:
        return {}
    good = [r for r in ops if r.op == "copy" and r.status == "ok" and r.median_s]
    mapped = [r for r in good if r.bytes / 2 > MAPPED_FROM_BYTES]
    at_hand = [r for r in good if r.family == "bandwidth" and r.split == "calibration"]
    if not mapped or not at_hand:
        return {}
    largest = max(at_hand, key=lambda r: r.bytes)
    byte_s = largest.median_s / largest.bytes  # type: ignore[operator]
    page_s = statistics.median(
        (r.median_s - byte_s * r.bytes) / (r.bytes / 2 / PAGE_BYTES)  # type: ignore[operator]
        for r in mapped
    )
    if page_s <= 0:
        return {}
    page = {"page_s": float(f"{page_s:.4g}"), "page_bytes": PAGE_BYTES, "source": "records"}
    return {"pages": page}


def _medians(ops: list[OpRecord], *families: str) -> dict[tuple[int, ...], float]:
    """By the sizes of a shape; of several families the last one's."""
    return {
        tuple(r.shape.values()): r.median_s
        for family in families
        for r in ops
        if (r.family, r.status) == (family, "ok") and r.median_s is not None
    }


def _graph(ops: list[OpRecord], end_to_end: list[Record]) -> dict[str, Any]:
    """A line through replays of graphs of 1 to 1 000 kernels, and what whole steps take beyond:
    one number a kernel, the mean over attnlab's calibration rows that a graph replayed.
    """
    timed = _medians([r for r in ops if r.op == "replay"], "graph")
    replays = {shape[0]: s for shape, s in timed.items()}
    if len(replays) < 2:
        return {}
    least, most = min(replays), max(replays)
    kernel_s = (replays[most] - replays[least]) / (most - least)
    replay_s = replays[least] - kernel_s * least
    replayed = [r for r in end_to_end if (r.mode, r.status) == ("graph", "ok")]
    rows = [r for r in replayed if (r.split, r.runtime) == ("calibration", "attnlab")]
    gaps = [
        (measured_s - gpu_s - replay_s) / kernel_count(program)
        for record in rows
        for _, measured_s, gpu_s, program in passes_of_record(record)
    ]
    between = dict[str, Any]()
    if gaps:
        between["between_s"] = float(f"{max(0.0, statistics.fmean(gaps)):.4g}")
        between["scaled_on"] = sorted(str(record.point) for record in rows)
    return {
        "graph": {
            "replay_s": float(f"{replay_s:.4g}"),
            "kernel_s": float(f"{kernel_s:.4g}"),
            "source": "records",
            **between,
        }
    }


def _energy(ops: list[OpRecord]) -> dict[str, Any]:
    """Idle power, then what a product and a copy take beyond it; products of further dtypes too."""
    known = {
        (r.op, r.dtype): r
        for r in sorted(ops, key=lambda r: r.flops)  # the largest product of each dtype
        if r.family == "sustained" and r.energy_j and r.median_s
    }
    wanted = (("idle", "bf16"), ("copy", "bf16"), ("linear", "bf16"))
    if any(one not in known for one in wanted):
        return {}
    idle, copy, _ = (known[one] for one in wanted)
    watts = idle.energy_j / idle.median_s  # type: ignore[operator]
    byte_j = (copy.energy_j - watts * copy.median_s) / copy.bytes  # type: ignore[operator]

    def product(dtype: str) -> tuple[float, float]:
        """Joules of a FLOP beyond the rest, and the clock: as a burst takes of what this took."""
        taken = known["linear", dtype]
        rest = taken.energy_j - watts * taken.median_s - byte_j * taken.bytes  # type: ignore[operator]
        bursts = _medians(
            [r for r in ops if (r.op, r.dtype) == ("linear", dtype)], "gemm", "ceiling"
        )
        burst_s = bursts.get(tuple(taken.shape.values()), taken.median_s)
        clock = min(1.0, burst_s / taken.median_s)  # type: ignore[operator]
        return float(f"{rest / taken.flops:.4g}"), round(clock, 3)

    flop_j, clock = product("bf16")
    others = {dtype: product(dtype) for op, dtype in known if op == "linear" and dtype != "bf16"}
    return {
        "energy": {
            "idle_w": round(watts, 1),
            "byte_j": float(f"{byte_j:.4g}"),
            "flop_j": flop_j,
            "source": "records",
            "clock": clock,
            **({"others": others} if others else {}),
        }
    }


def _half(ops: list[OpRecord]) -> dict[str, Any]:
    """What a product that computes takes in fp16 of the same one in bf16; others take as long."""
    by_key = {r.key: r for r in ops if r.status == "ok" and r.median_s and r.split == "calibration"}
    ratios = []
    for key, record in by_key.items():
        other = by_key.get(key.replace(f"/{HALF}/", "/bf16/"))
        computes = record.flops > COMPUTES * record.bytes
        if other is None or other is record or (record.family, record.op) != ("gemm", "linear"):
            continue
        if computes:
            ratios.append(record.median_s / other.median_s)  # type: ignore[operator]
    return {"half": round(statistics.median(ratios), 3)} if ratios else {}
