"""A sweep as a DataFrame, or streamed to a CSV or Parquet file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from planner.errors import ConfigError, shown
from planner.report import neutral
from planner.sweeps.cells import BYTES, LABELS, SIZES, TIMES, Block

if TYPE_CHECKING:
    import pandas as pd

SUFFIXES = (".csv", ".parquet")


def columns_of(*, latency: bool) -> list[str]:
    """The columns in their order."""
    timed = [*TIMES, "latency_basis"] if latency else []
    return [*LABELS, *SIZES, *BYTES, "fits", *timed, "refused"]


def to_frame(blocks: Sequence[Block], *, latency: bool) -> pd.DataFrame:
    """Labels and reasons categorical, bytes as nullable integers, times as floats."""
    import pandas as pd

    columns: dict[str, Any] = {}
    rows = [len(block.known) for block in blocks]
    known = np.concatenate([block.known for block in blocks])
    for place, name in enumerate(LABELS):
        columns[name] = _categories([block.combination.labels[place] for block in blocks], rows)
    for name in SIZES:
        columns[name] = np.concatenate([block.numbers[name] for block in blocks])
    for name in BYTES:
        values = np.concatenate([_numbers(block, name) for block in blocks])
        missing = ~known
        if name.startswith("kv_pool"):
            missing = missing | (values < 0)
        columns[name] = pd.arrays.IntegerArray(values, missing)
    fits = np.concatenate([_numbers(block, "fits").astype(bool) for block in blocks])
    columns["fits"] = pd.arrays.BooleanArray(fits, ~known)
    for name in TIMES if latency else ():
        values = np.concatenate([_numbers(block, name).astype(float) for block in blocks])
        columns[name] = np.where(known, values, np.nan)
    if latency:
        columns["latency_basis"] = _categories([block.latency_basis for block in blocks], rows)
    columns["refused"] = _reasons(blocks, rows)
    return pd.DataFrame(columns, columns=columns_of(latency=latency))


def _numbers(block: Block, name: str) -> Any:
    return block.numbers.get(name, np.zeros(len(block.known), dtype=np.int64))


def _categories(texts: Sequence[str], rows: Sequence[int]) -> Any:
    """A label for each block, repeated."""
    words: list[Any] = list(dict.fromkeys(texts))
    places = {word: place for place, word in enumerate(words)}
    codes = np.repeat(np.array([places[text] for text in texts], dtype=np.int32), rows)
    if words and all(word.isdecimal() and word.isascii() for word in words):
        words = [int(word) for word in words]
    return _coded(codes, words)


def _coded(codes: Any, words: Any) -> Any:
    import pandas as pd

    return pd.Categorical.from_codes(codes, categories=words)


def _reasons(blocks: Sequence[Block], rows: Sequence[int]) -> Any:
    import pandas as pd

    if all(block.known.all() for block in blocks):
        return _coded(np.zeros(sum(rows), dtype=np.int8), [""])
    return pd.Categorical(np.concatenate([block.refused for block in blocks]))


def to_file(blocks: Iterator[Block], path: Path, *, latency: bool) -> Path:
    """Write block by block; an old file stays until the new one is whole."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"to={shown(str(path))} is not allowed: a name that ends in .csv or "
                          ".parquet")  # fmt: skip
    writer = _csv_writer if path.suffix == ".csv" else _parquet_writer
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writer(partial) as write:
            for block in blocks:
                write(to_frame([block], latency=latency))
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


@contextmanager
def _csv_writer(path: Path) -> Iterator[Any]:
    with path.open("w", encoding="utf-8", newline="") as file:
        first = True

        def write(frame: pd.DataFrame) -> None:
            nonlocal first
            for name in frame.columns:
                if frame[name].dtype == "category":
                    frame[name] = frame[name].cat.rename_categories(neutral)
            frame.to_csv(file, index=False, header=first)
            first = False

        yield write


@contextmanager
def _parquet_writer(path: Path) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install pyarrow, or write .csv") from None
    made: list[Any] = []

    def write(frame: pd.DataFrame) -> None:
        for name in frame.columns:
            if frame[name].dtype == "category":  # blocks have categories of their own
                frame[name] = frame[name].astype(str)
        table = pa.Table.from_pandas(frame, preserve_index=False)
        if not made:
            made.append(pq.ParquetWriter(path, table.schema, use_dictionary=True))
        made[0].write_table(table.cast(made[0].schema))

    try:
        yield write
    finally:
        for writer in made:
            writer.close()
