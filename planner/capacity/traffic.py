"""Requests as they come: prompts and outputs of different lengths, and what one holds on average.

A request lives for its output tokens, step by step, and its cache grows meanwhile. So of the
requests that run at one moment, long outputs are more (each counts by its steps), and each is
somewhere between its prompt and its end.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from planner.errors import MAX_SIZE, ConfigError, check_size, shown

QUANTILES = 24
"""Lengths that stand for a lognormal distribution, each for as many requests."""

PROMPT_COLUMNS = ("prompt_tokens", "input_tokens", "ContextTokens", "num_prefill_tokens")
OUTPUT_COLUMNS = ("output_tokens", "generated_tokens", "GeneratedTokens", "num_decode_tokens")
"""Names that traces have: ours, and those of the Azure LLM inference and Vidur traces."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Kinds of requests: (prompt tokens, output tokens, how many of them)."""

    requests: tuple[tuple[int, int, float], ...]
    in_words: str

    def __post_init__(self) -> None:
        if not self.requests:
            raise ConfigError("requests is empty: at least one")
        for prompt, output, weight in self.requests:
            check_size("prompt_tokens", prompt)
            check_size("output_tokens", output)
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(f"weight={weight!r} is not allowed: a number above 0")

    @property
    def longest(self) -> tuple[int, int]:
        """The longest prompt and the longest output, not of one request perhaps."""
        return max(p for p, _, _ in self.requests), max(o for _, o, _ in self.requests)

    @property
    def mean(self) -> tuple[float, float]:
        """Mean prompt and output tokens of a request."""
        n = sum(weight for _, _, weight in self.requests)
        return (
            sum(p * weight for p, _, weight in self.requests) / n,
            sum(o * weight for _, o, weight in self.requests) / n,
        )


def fixed(prompt_tokens: int, output_tokens: int) -> Traffic:
    """All requests alike."""
    return Traffic(
        requests=((prompt_tokens, output_tokens, 1.0),),
        in_words=f"{prompt_tokens} prompt + {output_tokens} output tokens each",
    )


def lognormal(
    *,
    prompt_mean: float,
    prompt_sigma: float,
    output_mean: float,
    output_sigma: float,
    longest_tokens: int | None = None,
) -> Traffic:
    """Prompts and outputs independent and lognormal: their means, and the standard deviations of
    their logarithms. Requests longer than `longest_tokens` in all are left out, as an engine
    refuses them.
    """
    prompts = _lognormal("prompt", prompt_mean, prompt_sigma)
    outputs = _lognormal("output", output_mean, output_sigma)
    kept = Counter(
        (p, o)
        for p in prompts
        for o in outputs
        if longest_tokens is None or p + o <= longest_tokens
    )
    if not kept:
        raise ConfigError(
            f"longest_tokens={longest_tokens} leaves no request of a mean of {prompt_mean:g} + "
            f"{output_mean:g} tokens"
        )
    return Traffic(
        requests=tuple((p, o, float(n)) for (p, o), n in kept.items()),
        in_words=(
            f"lognormal, a mean of {prompt_mean:g} prompt (σ {prompt_sigma:g}) + {output_mean:g} "
            f"output tokens (σ {output_sigma:g})"
        ),
    )


def _lognormal(field: str, mean: float, sigma: float) -> list[int]:
    """Tokens at evenly spaced quantiles: exp(μ + σ·z), with μ such that the mean is `mean`."""
    for name, value, least in ((f"{field}_mean", mean, 1), (f"{field}_sigma", sigma, 0)):
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not math.isfinite(value) or value < least or value > MAX_SIZE:
            raise ConfigError(f"{name}={shown(value)} is not allowed: a number from {least} on")
    mu, normal = math.log(mean) - sigma**2 / 2, NormalDist()
    places = [(i + 0.5) / QUANTILES for i in range(QUANTILES)]
    return [
        min(MAX_SIZE, max(1, round(math.exp(mu + sigma * normal.inv_cdf(place)))))
        for place in places
    ]


def trace(path: str | Path) -> Traffic:
    """A CSV of requests with a column of prompt tokens and one of output tokens."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            return _traced(csv.DictReader(file), str(path))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{str(path)!r} cannot be read as CSV: {reason}") from None


def _traced(rows: csv.DictReader[str], path: str) -> Traffic:
    names = rows.fieldnames or ()
    columns = []
    for field, known in (("prompt_tokens", PROMPT_COLUMNS), ("output_tokens", OUTPUT_COLUMNS)):
        found = [name for name in known if name in names]
        if not found:
            raise ConfigError(f"{path!r} has no column {field} (nor {', '.join(known[1:])})")
        columns.append(found[0])
    seen: Counter[tuple[int, int]] = Counter()
    for number, row in enumerate(rows, start=2):
        prompt, output = (_tokens(row[name], name, number, path) for name in columns)
        if prompt and output:  # a request without either holds nothing
            seen[prompt, output] += 1
    if not seen:
        raise ConfigError(f"{path!r} has no requests")
    return Traffic(
        requests=tuple((p, o, float(n)) for (p, o), n in seen.items()),
        in_words=f"{sum(seen.values()):,} requests of {Path(path).name}",
    )


def _tokens(text: str | None, name: str, line: int, path: str) -> int:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (value.is_integer() and 0 <= value <= MAX_SIZE):
        raise ConfigError(
            f"{name}={shown(text)} in line {line} of {path!r} is not allowed: whole tokens"
        )
    return int(value)


def total_weight(requests: Iterable[tuple[int, int, float]]) -> float:
    """All requests, each by its steps: those that run at one moment."""
    return sum(output * weight for _, output, weight in requests)
