"""What people take away: the estimate in words, tables as CSV that a spreadsheet opens safely."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import ConfigError
from planner.format import gib, seconds

if TYPE_CHECKING:
    import pandas as pd

    from planner.estimate import Estimate

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


def write_csv(table: pd.DataFrame, path: str | Path) -> None:
    """Write CSV; ConfigError if it cannot be written. An old file stays until the new is whole."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(csv_text(table), encoding="utf-8", newline="")
        os.replace(partial, target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"{target} cannot be written: {error.strerror}") from None


def verdict(estimate: Estimate) -> str:
    """Fits or not, and by how much, in one sentence."""
    where = "of the KV pool" if estimate.kv_pool_bytes is not None else f"of {estimate.gpu.label}"
    room = gib(abs(estimate.headroom_bytes))
    if estimate.fits:
        return f"Fits: {room} {where} stay free."
    return f"Does not fit: {room} more {where} would be needed."


def explain(estimate: Estimate) -> str:
    """The parts, each with its largest items and what causes the peak."""
    e, m = estimate, estimate.memory
    lines = [
        f"{e.model.name} in {e.deploy.runtime} on {e.gpu.label}: batch {e.work.batch}, "
        f"{e.work.prompt_tokens} prompt + {e.work.output_tokens} output tokens, {e.setting.dtype}, "
        f"{e.setting.attention} attention",
        verdict(e),
        f"  total        {gib(m.total_bytes):>12}  of {gib(e.gpu.memory_bytes)}",
    ]
    for component, size in (
        ("weights", m.weights_bytes),
        ("kv_cache", m.kv_cache_bytes),
        ("activations", m.activations_bytes),
        ("overhead", m.overhead_bytes),
    ):
        lines.append(f"  {component:<12} {gib(size):>12}")
        rows = [r for r in e.rows if r.component == component and r.size_bytes]
        for row in sorted(rows, key=lambda r: -abs(r.size_bytes))[:4]:
            times = f"{row.count} × " if row.count > 1 else ""
            lines.append(f"    {row.item}: {gib(row.size_bytes)} = {times}{row.substituted}")
    layer = "" if e.peak.layer is None else f" of layer {e.peak.layer}"
    lines.append(f"  peak: {e.peak.op}{layer}, {e.peak_phase}")
    if e.kv_pool_tokens is not None and e.kv_pool_bytes is not None:
        lines.append(f"  KV pool: {gib(e.kv_pool_bytes)}, {e.kv_pool_tokens:,} tokens")
    lines.append(
        f"  TTFT {seconds(e.latency.ttft_s)}, TPOT {seconds(e.latency.tpot_s)}, "
        f"{e.latency.output_tokens_per_s:,.0f} output tokens/s ({e.latency.basis})"
    )
    if e.model.defaults:
        lines.append(f"  taken by default: {', '.join(e.model.defaults)}")
    return "\n".join(lines)
