"""Measured ops by family, from the tables in the package aiconfigurator-core (Apache-2.0).

NVIDIA's op latencies of vLLM on nine GPUs, in milliseconds, a row an op of one layer. The package
is read where it is installed (the extra `silicon`) or unpacked; nothing of it is imported.

What is left out, and why: L40S products that fit its 96 MB L2, which the tables time warm; heads of
512 (a flat 1.7 ms on an H200); windows; caches in fp8, but as a fit of their own. A mixture's
layer is cut into its two grouped products by their FLOPs; of its rows those dealt out in turn are
fitted, those under a power law are a check (benchmarks/power_law_routing.py). Every fourth shape,
by a checksum of its (n, k) or (heads, key-value heads, head dim), is held out.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planner import ConfigError
from planner.errors import shown
from profiles.fitting import Array, Samples

SYSTEMS: Mapping[str, str] = {
    "a100-80gb": "a100_sxm",
    "h100-80gb": "h100_sxm",
    "h200": "h200_sxm",
    "l40s": "l40s",
    "b200": "b200_sxm",
    "b300": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "rtx-pro-6000": "rtx_pro_6000_server",
}
"""The tables' name of a GPU of the catalogue."""

HELD_OUT_EVERY = 4
LARGEST_HEAD_DIM = 256
WARM_L2_BYTES = 96 * 2**20
PACKAGE = "aiconfigurator_core"


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """Samples by the name of their fit, and the versions they were measured with."""

    samples: Mapping[str, Samples]
    version: str
    measured_with: str


def package_folder(given: Path | None = None) -> Path:
    """Where the tables lie; ConfigError that says how to get them."""
    from importlib.util import find_spec

    if given is not None:
        found = [p for p in (given, given / PACKAGE) if (p / "systems" / "data").is_dir()]
        if not found:
            raise ConfigError(f"tables={shown(str(given))} has no systems/data")
        return found[0]
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "aiconfigurator-core is not installed: pip install 'transformer-planner[silicon]', or "
            "--tables FOLDER where its wheel was unpacked"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def samples_of_tables(gpu: str, folder: Path) -> Tables:
    """All families that the tables have for this GPU."""
    if gpu not in SYSTEMS:
        raise ConfigError(f"gpu={shown(gpu)} has no tables: {', '.join(SYSTEMS)}")
    data = folder / "systems" / "data" / SYSTEMS[gpu]
    if not data.is_dir():
        raise ConfigError(f"gpu={shown(gpu)}: {data} is not there")
    samples, versions = dict[str, Samples](), set[str]()
    for op, make in (("gemm", _products), ("attention", _attention), ("moe", _experts)):
        newest = _newest(data / op / "vllm")
        if newest is not None:
            versions.add(f"vllm {newest.name}")
            samples |= make(newest, gpu)
    samples |= {**_all_reduce(data, versions), **_sharded(data)}
    return Tables(
        samples=samples, version=_version(folder), measured_with=", ".join(sorted(versions))
    )


def held_out(*sizes: int) -> bool:
    """Whether a shape is kept from the fit: a checksum of its sizes, so that all m of it go."""
    return zlib.crc32("x".join(map(str, sizes)).encode()) % HELD_OUT_EVERY == 0


def _version(folder: Path) -> str:
    for info in folder.parent.glob("aiconfigurator_core-*.dist-info"):
        return info.name.split("-")[1].removesuffix(".dist")
    return "unknown"


def _newest(folder: Path) -> Path | None:
    found = [p for p in folder.glob("*") if p.is_dir() and any(p.glob("*.parquet"))]

    def version(folder: Path) -> list[int]:
        return [int(n) for n in folder.name.split(".") if n.isdigit()]

    return max(found, key=version, default=None)


def _read(path: Path) -> Any:
    import pandas as pd

    return pd.read_parquet(path)


def _samples(table: Any, columns: list[str], *, shape: list[str], scale: float = 1e-3) -> Samples:
    """The median of each set of sizes, ms → s."""
    grouped = table.groupby(columns).latency.median().reset_index()
    marks = [held_out(*map(int, row)) for row in grouped[shape].itertuples(index=False)]
    return Samples(
        sizes=grouped[columns].to_numpy(dtype=np.float64),
        seconds=grouped.latency.to_numpy(dtype=np.float64) * scale,
        held_out=np.array(marks, dtype=bool),
    )


def _products(folder: Path, gpu: str) -> dict[str, Samples]:
    made = {}
    table = _read(folder / "gemm_perf.parquet")
    for theirs, dtype, itemsize in (("bfloat16", "bf16", 2), ("fp8", "fp8", 1)):
        rows = table[table.gemm_dtype == theirs]
        if gpu == "l40s":
            rows = rows[itemsize * rows.n * rows.k > WARM_L2_BYTES]
        if len(rows):
            made[f"gemm:{dtype}"] = _samples(rows, ["m", "n", "k"], shape=["n", "k"])
    return made


def _attention(folder: Path, gpu: str) -> dict[str, Samples]:
    heads = ["num_heads", "num_key_value_heads", "head_dim"]
    made = {}
    for file, family, tokens in (
        ("generation_attention_perf", "decode", "context"),
        ("context_attention_perf", "prefill", "isl"),
    ):
        table = _read(folder / f"{file}.parquet")
        if "window_size" in table:
            table = table[table.window_size == 0]
        table = table[table.head_dim <= LARGEST_HEAD_DIM]
        if family == "decode":
            table = table.assign(context=table.step + 1)
        for theirs, dtype in (("bfloat16", "bf16"), ("fp8", "fp8")):
            rows = table[table.kv_cache_dtype == theirs]
            if len(rows) and (family == "decode" or dtype == "bf16"):
                columns = ["batch_size", tokens, *heads]
                made[f"{family}:{dtype}:vllm"] = _samples(rows, columns, shape=heads)
    return made


def _experts(folder: Path, gpu: str) -> dict[str, Samples]:
    """A layer's time, cut by FLOPs: two thirds for gate and up, one for down."""
    table = _read(folder / "moe_perf.parquet")
    rows = table[
        (table.moe_dtype == "bfloat16")
        & (table.distribution == "balanced")
        & (table.moe_tp_size == 1)
        & (table.moe_ep_size == 1)
    ]
    if not len(rows):
        return {}
    rows = rows.assign(m=rows.num_tokens * rows.topk)
    rows = rows.assign(E=np.minimum(rows.m, rows.num_experts))
    parts = []
    for share, n, k in ((2 / 3, 2 * rows.inter_size, rows.hidden_size),
                        (1 / 3, rows.hidden_size, rows.inter_size)):  # fmt: skip
        part = rows.assign(n=n, k=k)
        parts.append(_samples(part, ["m", "E", "n", "k"], shape=["n", "k"], scale=share * 1e-3))
    return {"grouped:bf16:vllm": _joined(parts)}


def _all_reduce(data: Path, versions: set[str]) -> dict[str, Samples]:
    """vLLM's own in a CUDA graph up to its largest size, NCCL's beyond; and NCCL's alone."""
    made: dict[str, Samples] = {}
    own, nccl = _newest(data / "comm" / "vllm"), _newest(data / "comm" / "nccl")
    for gpus in (2, 4, 8):
        rows = [] if own is None else _own_reduce(own, gpus)
        others = [] if nccl is None else _nccl(nccl, gpus, "all_reduce")
        largest = max((size for size, _ in rows), default=0.0)
        rows += [row for row in others if row[0] > largest]
        for name, found in ((f"all_reduce:{gpus}", rows), (f"all_reduce:{gpus}:nccl", others)):
            if found:
                made[name] = _by_size(found)
    versions |= {f"{p.parent.name} {p.name}" for p in (own, nccl) if p is not None}
    return made


def _by_size(rows: list[tuple[float, float]]) -> Samples:
    return Samples(
        sizes=np.array([[size] for size, _ in rows]),
        seconds=np.array([seconds for _, seconds in rows]),
        held_out=np.zeros(len(rows), dtype=bool),
    )


def _own_reduce(folder: Path, gpus: int) -> list[tuple[float, float]]:
    """Bytes (two an element) and seconds of vLLM's all-reduce."""
    table = _read(folder / "custom_allreduce_perf.parquet")
    rows = table[table.num_gpus == gpus]
    if "backend" in table:
        rows = rows[rows.backend == "vllm_graph"]
    return [
        (2.0 * size, ms * 1e-3) for size, ms in zip(rows.message_size, rows.latency, strict=True)
    ]


def _sharded(data: Path) -> dict[str, Samples]:
    """NCCL's, by the bytes of all parts together."""
    nccl = _newest(data / "comm" / "nccl")
    made: dict[str, Samples] = {}
    for kind in ("all_gather", "reduce_scatter"):
        for gpus in (2, 4, 8):
            rows = [] if nccl is None else _nccl(nccl, gpus, kind)
            if rows:
                made[f"{kind}:{gpus}"] = _by_size(rows)
    return made


def _nccl(folder: Path, gpus: int, kind: str) -> list[tuple[float, float]]:
    table = _read(folder / "nccl_perf.parquet")
    half = (table.op_name == kind) & (table.nccl_dtype == "half")
    rows = table[half & (table.num_gpus == gpus)]
    return [
        (2.0 * size, ms * 1e-3) for size, ms in zip(rows.message_size, rows.latency, strict=True)
    ]


def _joined(parts: list[Samples]) -> Samples:
    def all_of(name: str) -> Array:
        made: Array = np.concatenate([getattr(part, name) for part in parts])
        return made

    return Samples(
        sizes=all_of("sizes"),
        seconds=all_of("seconds"),
        held_out=all_of("held_out").astype(bool),
    )
