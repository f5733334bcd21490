"""The same few points, given to our fit and to aiconfigurator's own interpolation.

    pip install '.[silicon]'
    python benchmarks/aiconfigurator_points.py --gpu h200

Both are asked for the ops of aiconfigurator's tables whose (n, k), or heads and head dim, are held
out (profiles/op_tables.py). Its compiled engine is run over a copy of its tables that has nothing
but the points; where it refuses to answer, that is counted and the row leaves its errors, not ours.
What its op adds to a row of the table (13 µs to prefill attention) is taken off again, as the
median over given rows. "all" are the calibration rows, every one; ours takes as many of them as the
committed calibrations do.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from planner.catalog.gpus import gpu_named
from planner.timing.op_times import family_named
from profiles.calibrate import OTHER_POINTS, POINTS
from profiles.fitting import Array, Samples, fit_family, predicted, spread
from profiles.op_tables import SYSTEMS, package_folder, samples_of_tables

COUNTS = (100, 300, 800)
ASKED = 4000
"""Held-out rows that are asked for at most, drawn at random."""
GIVEN = 50
"""Rows that an engine has been given, asked for again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One of theirs: its file, the fit that reads it, the columns of its sizes, and the query."""

    name: str
    fit: str
    folder: str
    file: str
    dtype: tuple[str, str]
    columns: tuple[str, ...]
    ask: Callable[[Any, Any, Array], float]


def main() -> None:
    """Print a table for each family."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h200", choices=sorted(SYSTEMS))
    gpu = parser.parse_args().gpu
    folder = package_folder()
    samples = samples_of_tables(gpu, folder).samples
    print(f"{gpu}: |predicted / measured − 1| over held-out shapes, median / p90")
    print(f"{'':<24}{'points':>9}{'ours':>18}{'aiconfigurator':>18}  answered")
    for table in TABLES:
        if table.fit in samples:
            compare(table, samples[table.fit], gpu, folder)


def compare(table: Table, samples: Samples, gpu: str, folder: Path) -> None:
    """Every count of points, then all."""
    family, dtype = table.fit.split(":")[:2]
    known, catalogue = family_named(family), gpu_named(gpu)
    seen = samples.of(~samples.held_out)
    unseen = samples.of(samples.held_out)
    chance = np.random.default_rng(0)
    unseen = unseen.of(chance.permutation(len(unseen))[:ASKED])
    most = POINTS.get(f"{family}:{dtype}", OTHER_POINTS)
    for count in (*(n for n in COUNTS if n < len(seen)), len(seen)):
        fit = fit_family(
            known,
            dtype,
            samples,
            peak=catalogue.flops_per_s(dtype),
            bandwidth=catalogue.memory_bandwidth_bytes_per_s,
            source="tables",
            points=min(count, most) if count == len(seen) else count,
        )
        ours = predicted(fit, unseen.sizes) / unseen.seconds - 1.0
        given = seen.of(spread(np.log2(seen.sizes) / np.array(known.scales), count))
        with narrowed(table, given, gpu, folder) as systems:
            again = given.of(chance.permutation(len(given))[:GIVEN])
            added = float(np.nanmedian(answers(table, again, gpu, systems) - again.seconds))
            theirs = (answers(table, unseen, gpu, systems) - added) / unseen.seconds - 1.0
        answered = np.isfinite(theirs)
        which = f"{count}" if count != len(seen) else f"all {count}"
        print(
            f"{table.name:<24}{which:>9}{errors(ours):>18}{errors(theirs[answered]):>18}"
            f"  {answered.mean():.0%}"
        )


def errors(off: Array) -> str:
    """Median and 90th percentile of the absolute errors, in percent."""
    if not len(off):
        return "–"
    size = np.abs(off)
    return f"{np.median(size):.1%} / {np.quantile(size, 0.9):.1%}"


@contextmanager
def narrowed(table: Table, given: Samples, gpu: str, folder: Path) -> Iterator[Path]:
    """Their systems folder with the given rows of one table and nothing else of this GPU."""
    system = SYSTEMS[gpu]
    origin = folder / "systems"
    version = newest(origin / "data" / system / table.folder / "vllm")
    with tempfile.TemporaryDirectory() as made:
        systems = Path(made) / "systems"
        target = systems / "data" / system / table.folder / "vllm" / version.name
        target.mkdir(parents=True)
        for file in (*origin.glob("*.yaml"), *origin.glob("*.csv")):
            shutil.copy(file, systems)
        for file in version.glob("*.yaml"):
            shutil.copy(file, target)
        theirs = pd.read_parquet(version / f"{table.file}.parquet")
        kept = theirs[theirs[table.dtype[0]] == table.dtype[1]]
        if "window_size" in kept:
            kept = kept[kept.window_size == 0]
        wanted = {tuple(row) for row in given.sizes.astype(int)}
        sizes = sizes_of(kept, table)
        chosen = kept[[tuple(row) in wanted for row in sizes]]
        chosen.to_parquet(target / f"{table.file}.parquet")
        yield systems


def sizes_of(rows: pd.DataFrame, table: Table) -> Array:
    """The sizes of their rows, as ours count them."""
    if "context" in table.columns:
        rows = rows.assign(context=rows.step + 1)
    made: Array = rows[list(table.columns)].to_numpy(dtype=int)
    return made


def newest(folder: Path) -> Path:
    """The latest version that has been measured."""
    return max(
        (path for path in folder.iterdir() if path.is_dir()),
        key=lambda path: [int(n) for n in path.name.split(".") if n.isdigit()],
    )


def answers(table: Table, unseen: Samples, gpu: str, systems: Path) -> Array:
    """Seconds by their engine, op by op; NaN where it has no answer."""
    from aiconfigurator_core.sdk import perf_database

    system = SYSTEMS[gpu]
    version = newest(systems / "data" / system / table.folder / "vllm").name
    database = perf_database.get_database(
        system, "vllm", version, systems_paths=str(systems), shared_layer=False
    )
    return np.array([_asked(table, database, sizes) for sizes in unseen.sizes])


def _asked(table: Table, database: Any, sizes: Array) -> float:
    from aiconfigurator_core.sdk import common

    try:
        return table.ask(common, database, sizes) * 1e-3
    except Exception:  # whatever their engine raises for what it cannot interpolate
        return float("nan")


def _evaluate(database: Any, op: Any, *, is_context: bool, batch: int, s: int, x: int) -> float:
    from aiconfigurator_core.sdk.engine import _evaluate_single_op

    found = _evaluate_single_op(
        database, op, is_context=is_context, batch_size=batch, s=s, x=x or None
    )
    return float(found)


def _product(quantised: str) -> Callable[[Any, Any, Array], float]:
    def ask(common: Any, database: Any, sizes: Array) -> float:
        from aiconfigurator_core.sdk import operations

        m, n, k = map(int, sizes)
        op = operations.GEMM("product", 1.0, n, k, common.GEMMQuantMode[quantised])
        return _evaluate(database, op, is_context=True, batch=1, s=1, x=m)

    return ask


def _decode(common: Any, database: Any, sizes: Array) -> float:
    from aiconfigurator_core.sdk import operations

    batch, context, heads, kv_heads, head_dim = map(int, sizes)
    kept = common.KVCacheQuantMode.bfloat16
    op = operations.GenerationAttention("decode", 1.0, heads, kv_heads, kept, head_size=head_dim)
    return _evaluate(database, op, is_context=False, batch=batch, s=context, x=0)


def _prefill(common: Any, database: Any, sizes: Array) -> float:
    from aiconfigurator_core.sdk import operations

    batch, tokens, heads, kv_heads, head_dim = map(int, sizes)
    kept, computed = common.KVCacheQuantMode.bfloat16, common.FMHAQuantMode.bfloat16
    op = operations.ContextAttention(
        "prefill", 1.0, heads, kv_heads, kept, computed, head_size=head_dim
    )
    return _evaluate(database, op, is_context=True, batch=batch, s=tokens, x=0)


HEADS = ("num_heads", "num_key_value_heads", "head_dim")
TABLES = (
    Table(
        name="products, bf16",
        fit="gemm:bf16",
        folder="gemm",
        file="gemm_perf",
        dtype=("gemm_dtype", "bfloat16"),
        columns=("m", "n", "k"),
        ask=_product("bfloat16"),
    ),
    Table(
        name="products, fp8",
        fit="gemm:fp8",
        folder="gemm",
        file="gemm_perf",
        dtype=("gemm_dtype", "fp8"),
        columns=("m", "n", "k"),
        ask=_product("fp8"),
    ),
    Table(
        name="decode attention, bf16",
        fit="decode:bf16:vllm",
        folder="attention",
        file="generation_attention_perf",
        dtype=("kv_cache_dtype", "bfloat16"),
        columns=("batch_size", "context", *HEADS),
        ask=_decode,
    ),
    Table(
        name="prefill attention, bf16",
        fit="prefill:bf16:vllm",
        folder="attention",
        file="context_attention_perf",
        dtype=("kv_cache_dtype", "bfloat16"),
        columns=("batch_size", "isl", *HEADS),
        ask=_prefill,
    ),
)


if __name__ == "__main__":
    main()
