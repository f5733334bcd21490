"""How the tokens of a pass are dealt out to the experts of a mixture, and what that costs.

A token's k experts are different ones, and tokens choose apart: expert e is among a token's with
probability π_e, Σ π_e = k, so that of N tokens X_e ~ Binomial(N, π_e) come to it. How the k are
drawn together within a token changes neither of the two sums that time needs:

    experts reached   Σ_e P(X_e > 0) = Σ_e 1 − (1 − π_e)ᴺ
    tiles of t rows   Σ_e E⌈X_e / t⌉ = Σ_e Σ_{j≥0} P(X_e > j·t)

What grouped products allocate does not depend on it. Trained routers are held near uniform over
many tokens (arXiv:2408.15664), texts of one domain are not (arXiv:2412.19437, app. C: loads by
domain): a power of the rank stands for that, in one number. Tensor parallel ranks hold a slice of
every expert, and so the same rows; experts that are spread over ranks are not planned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from planner.errors import ConfigError, check_choice, shown

Number: TypeAlias = Any
Array = NDArray[np.float64]
DISTRIBUTIONS = ("uniform", "balanced", "zipf")
MOST_SKEW = 8.0
CHUNK = 2**20
"""Numbers of an array of cells and experts that are worked on at a time."""
SPAN = 6
"""Standard deviations that are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """How experts are picked. Models without experts are not touched by it.

    `distribution`: "uniform", each token's at random, every expert as often; "zipf", the r-th most
    popular expert by a share of the tokens that falls as r^−skew, by all of them at most;
    "balanced", dealt out in turn, as benchmarks of kernels do.
    """

    distribution: Literal["uniform", "balanced", "zipf"] = "uniform"
    skew: float = 0.0

    def __post_init__(self) -> None:
        check_choice("routing.distribution", self.distribution, DISTRIBUTIONS)
        known = isinstance(self.skew, int | float) and not isinstance(self.skew, bool)
        zipf = self.distribution == "zipf"
        if not known or not 0 <= self.skew <= MOST_SKEW * zipf:
            allowed = f"0 to {MOST_SKEW:g}" if zipf else f"0 for {self.distribution!r}"
            raise ConfigError(f"routing.skew={shown(self.skew)} is not allowed: {allowed}")

    @property
    def in_words(self) -> str:
        """The distribution, and how skewed it is."""
        return f"zipf:{self.skew:g}" if self.distribution == "zipf" else self.distribution

    @property
    def balanced(self) -> bool:
        """Whether picks are dealt out in turn, not at random."""
        return self.distribution == "balanced"

    def fullest(self, experts: int, top_k: int) -> float:
        """What the most popular expert is picked over the mean: E · max π_e / k."""
        shares, _ = _shares(experts, top_k, self.skew)
        return float(shares.max()) * experts / top_k

    def reached(self, experts: int, top_k: int, tokens: Number) -> Number:
        """How many experts some of these tokens go to, in expectation; balanced: min(E, k · N)."""
        if self.balanced:
            return np.minimum(experts, top_k * tokens)
        return _summed(
            lambda shares, n, _: 1.0 - (1.0 - shares) ** n,
            _shares(experts, top_k, self.skew),
            tokens,
            1.0,
        )

    def tiles(self, experts: int, top_k: int, tokens: Number, tile: Number) -> Number:
        """How many tiles of so many rows the experts' rows fill, the last of each in part."""
        if self.balanced:
            rows = top_k * np.asarray(tokens, dtype=np.float64)
            each = np.floor(rows / experts)  # and of some experts one more
            more = rows - each * experts
            return (experts - more) * np.ceil(each / tile) + more * np.ceil((each + 1.0) / tile)
        return _summed(_tiles_of_one, _shares(experts, top_k, self.skew), tokens, tile)


UNIFORM = Routing()


def routing_spec(text: str) -> Routing:
    """A Routing written in one word: uniform, balanced, zipf:1.2."""
    distribution, colon, skew = text.partition(":")
    try:
        number = float(skew) if colon else 0.0
    except ValueError:
        raise ConfigError(
            f"routing={shown(text)} is not understood: uniform, balanced or zipf:SKEW"
        ) from None
    if distribution == "zipf" and not colon:
        raise ConfigError("routing='zipf' is not understood: zipf:SKEW, such as zipf:1.2")
    return Routing(distribution=distribution, skew=number)  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _shares(experts: int, top_k: int, skew: float) -> tuple[Array, Array]:
    """π of each kind of expert, and how many are of that kind: min(1, c · rank^−skew), Σ = k."""
    if skew == 0.0:
        return np.array([top_k / experts]), np.array([float(experts)])
    weights = np.arange(1.0, experts + 1.0) ** -skew
    behind = np.cumsum(weights[::-1])[::-1]  # of this expert and all that are less popular
    for whole in range(top_k + 1):  # so many are picked by every token
        if whole == experts:
            break
        scale = (top_k - whole) / behind[whole]
        if scale * weights[whole] <= 1.0:
            break
    shares = np.ones(experts)
    shares[whole:] = scale * weights[whole:] if whole < experts else 1.0
    return shares, np.ones(experts)


def _summed(
    of_one: Callable[[Array, Array, Array], Array],
    kinds: tuple[Array, Array],
    tokens: Number,
    tile: Number,
) -> Number:
    """Σ over the experts of what is expected of one, cell by cell."""
    shares, _ = kinds
    cells = np.broadcast(tokens, tile)
    n, t = (np.broadcast_to(x, cells.shape).astype(np.float64).ravel() for x in (tokens, tile))
    if len(shares) == 1 or cells.size == 1:
        return _of_cells(of_one, kinds, n, t).reshape(cells.shape)[()]
    each, back = np.unique(np.stack((n, t)), axis=1, return_inverse=True)  # steps are often alike
    made, step = np.empty(each.shape[1]), max(1, CHUNK // len(shares))
    for start in range(0, len(made), step):
        made[start : start + step] = _of_cells(of_one, kinds, *each[:, start : start + step])
    return made[back.ravel()].reshape(cells.shape)


def _of_cells(
    of_one: Callable[[Array, Array, Array], Array],
    kinds: tuple[Array, Array],
    tokens: Array,
    tile: Array,
) -> Array:
    shares, counts = kinds
    return of_one(shares, tokens[:, None], tile[:, None]) @ counts


def _tiles_of_one(shares: Array, tokens: Array, tile: Array) -> Array:
    """E⌈X / t⌉: exact for X > 0, by the normal limit for the boundaries beyond.

    Where X spreads over more than a tile, its last one is anything: X / t + (1 − 1 / t) / 2.
    """
    mean = tokens * shares
    spread = np.sqrt(mean * (1.0 - shares))
    first = np.maximum(np.floor(mean / tile) - SPAN, 1.0)  # those before are passed for sure
    made = 1.0 - (1.0 - shares) ** tokens + (first - 1.0)
    for j in range(2 * SPAN + 1):
        made += _normal((mean - (first + j) * tile - 0.5) / np.maximum(spread, 1e-9))
    return np.where(spread > tile, mean / tile + (1.0 - 1.0 / tile) / 2.0, made)


def _normal(z: Array) -> Array:
    """Φ(z) within 1.4e-4 (Bowling et al., doi:10.3926/jiem.2009.v2n1.p114-127)."""
    z = np.clip(z, -8.0, 8.0)
    made: Array = 1.0 / (1.0 + np.exp(-z * (1.5976 + 0.07056 * z * z)))
    return made
