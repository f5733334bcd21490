"""What a run found, as text: a line for each family, and what did not come out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from profiles.microbench.op_record import OpRecord, merged

HEADER = f"{'family':<11}{'ok':>5}{'failed':>8}{'spread':>9}{'TFLOP/s':>10}{'GB/s':>9}{'wall':>9}"


def table(records: Sequence[OpRecord]) -> Iterator[str]:
    """Points, the median spread of their samples, the best rates reached, seconds spent."""
    yield HEADER
    for family in dict.fromkeys(record.family for record in records):
        mine = [record for record in records if record.family == family]
        good = [record for record in mine if record.status == "ok"]
        spreads = sorted(_spread(record) for record in good)
        spread = f"{spreads[len(spreads) // 2]:.1%}" if spreads else "–"
        flops_per_s = max((r.flops / (r.median_s or 1) for r in good), default=0)
        bytes_per_s = max(
            (r.bytes / (r.median_s or 1) for r in good if r.cache == "cold"), default=0
        )
        wall_s = sum(record.wall_s for record in mine)
        yield (
            f"{family:<11}{len(good):>5}{len(mine) - len(good):>8}{spread:>9}"
            f"{flops_per_s / 1e12:>10.3g}{bytes_per_s / 1e9:>9.4g}{wall_s:>7.1f} s"
        )
    yield from repeatability(records)
    for record in records:
        if record.status != "ok":
            yield f"{record.key}: {record.status}"


def repeatability(records: Sequence[OpRecord]) -> Iterator[str]:
    """Points that were measured twice, and by how much the second differs from the first."""
    by_key = merged(records)
    for key, second in by_key.items():
        first = by_key.get(key.removesuffix("/repeat1"))
        if second.repeat and first and first.median_s and second.median_s:
            change = second.median_s / first.median_s - 1
            yield f"again {change:+7.1%}  {first.median_s * 1e6:>10.1f} µs  {first.key}"


def _spread(record: OpRecord) -> float:
    median_s = record.median_s
    return (max(record.samples_s) - min(record.samples_s)) / median_s if median_s else 0.0
