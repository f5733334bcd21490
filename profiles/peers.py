"""What other tools predict for Llama-3.1-8B on an H200: data/peers/, printed by those tools."""

from __future__ import annotations

import csv
from functools import cache

from profiles.records import DATA

MODEL, GPU, DTYPE = "llama-3.1-8b", "h200", "bf16"
TABLE = DATA / "peers" / f"{MODEL}-{GPU}.csv"


@cache
def figures_s() -> dict[tuple[int, int, str], dict[str, float]]:
    """By (batch, prompt tokens, quantity): each peer's seconds."""
    found: dict[tuple[int, int, str], dict[str, float]] = {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            for quantity in ("ttft", "tpot"):
                key = (int(line["batch"]), int(line["prompt_tokens"]), f"{quantity}_s")
                found.setdefault(key, {})[line["peer"]] = float(line[f"{quantity}_ms"]) / 1e3
    return found
