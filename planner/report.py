"""Tables as CSV that a spreadsheet opens safely."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def neutral(cell: object) -> object:
    """Text that a spreadsheet would run as a formula gets a leading apostrophe; the rest stays."""
    if isinstance(cell, str) and cell.startswith(_FORMULA_STARTS):
        return f"'{cell}"
    return cell


def csv_text(table: pd.DataFrame) -> str:
    """The table as CSV, column names included, cells neutralised."""
    safe = table.astype(object).map(neutral)
    return safe.rename(columns=neutral).to_csv(index=False)


def write_csv(table: pd.DataFrame, path: str | Path, *, excel: bool = False) -> None:
    """Write CSV; ConfigError if it cannot be written. An old file stays until the new is whole.

    `excel`: with the mark by which Excel knows UTF-8; pandas passes over it.
    """
    write_text(csv_text(table), path, encoding="utf-8-sig" if excel else "utf-8")


def write_parquet(table: pd.DataFrame, path: str | Path) -> None:
    """Write Parquet, as `write_csv` writes CSV; ConfigError without pyarrow."""
    import io

    buffer = io.BytesIO()
    try:
        table.to_parquet(buffer, index=False)
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install pyarrow, or write CSV") from None
    _write(buffer.getvalue(), path)


def write_text(text: str, path: str | Path, *, encoding: str = "utf-8") -> None:
    """Write a text file, as `write_csv`."""
    _write(text.encode(encoding), path)


def _write(content: bytes, path: str | Path) -> None:
    """A link is followed; what exists and is no regular file (a device, a folder) is refused."""
    partial = None
    try:
        target = Path(path).resolve()
        if target.exists() and not target.is_file():
            raise ConfigError(f"{path} cannot be written: not a regular file")
        partial = target.with_name(f".{target.name}.partial")
        partial.write_bytes(content)
        os.replace(partial, target)
    except (OSError, ValueError) as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        if isinstance(error, ConfigError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{str(path)!r} cannot be written: {reason}") from None
