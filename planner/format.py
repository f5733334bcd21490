"""Numbers as people read them. GB = 10⁹, GiB = 2³⁰; a unit stands in every text."""

from __future__ import annotations


def gib(size_bytes: float) -> str:
    """Bytes in GiB, or MiB and KiB where that reads better."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size_bytes) >= factor * 0.995:
            return f"{size_bytes / factor:,.2f} {unit}"
    return f"{size_bytes:,.0f} B"


def seconds(time_s: float | None) -> str:
    """A time in s, ms or µs."""
    if time_s is None:
        return "none"
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if time_s >= factor:
            return f"{time_s / factor:,.3g} {unit}"
    return f"{time_s / 1e-6:,.3g} µs"


def rate(per_s: float) -> str:
    """So many a second; the unit is the quantity's name."""
    return f"{per_s:,.0f}" if abs(per_s) >= 1000 else f"{per_s:,.4g}"


def percent(fraction: float) -> str:
    """A signed error in percent."""
    return f"{fraction:+.2%}"


def count(number: float) -> str:
    """A count in thousands, millions, billions."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:g}"


QUANTITIES = {
    "weights_bytes": "Weights",
    "kv_cache_bytes": "KV cache",
    "gradients_bytes": "Gradients",
    "optimizer_bytes": "Optimizer states",
    "peak_live_bytes": "Peak, live",
    "peak_allocated_bytes": "Peak, allocated",
    "peak_reserved_bytes": "Peak, reserved",
    "device_used_bytes": "Device used",
    "ttft_s": "TTFT",
    "tpot_s": "TPOT",
    "new_tpot_s": "TPOT, new lengths",
    "replay_s": "Decode step, replayed",
    "step_s": "Step",
    "end_to_end_s": "End to end",
    "tokens_per_s": "Tokens/s",
}
"""What is predicted and measured, as people call it."""


def of_quantity(name: str) -> str:
    """A quantity's name for people; another name as it is."""
    return QUANTITIES.get(name, name)


def of_value(quantity: str, number: float) -> str:
    """A value in the unit that its quantity's name ends in."""
    if quantity.endswith("_per_s"):
        return rate(number)
    return seconds(number) if quantity.endswith("_s") else gib(number)
