"""Cases in which every value of an axis meets every value of each other axis, in few of them.

A product of four axes asks again and again what two of them already answered. A mistake that
depends on two axes shows in one of these cases as surely as in the product; one that needs three at
once is left to the random models and to `make fuzz`, which runs whole products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

from tests.properties import is_fuzzed

Row = tuple[int, ...]
Pair = tuple[int, int, int, int]


def every_pair(*groups: Mapping[str, Iterable[Any]], **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrises a test by these axes: `every_pair(family=FAMILIES, dtype=("fp32", "bf16"))`.

    Groups of axes are covered each for itself: of windowed families every cache meets every chunk.
    """
    groups = groups or (axes,)
    names = list(groups[0])
    cases = {}
    for group in groups:
        values = [list(group[name]) for name in names]
        sizes = [len(axis) for axis in values]
        for row in product(*map(range, sizes)) if is_fuzzed() else covering(sizes):
            case = [axis[at] for axis, at in zip(values, row, strict=True)]
            cases["-".join(map(_named, case, row))] = case
    marked = [pytest.param(*case, id=name, marks=pytest.mark.pairs) for name, case in cases.items()]
    return pytest.mark.parametrize(names, marked)


def covering(sizes: Sequence[int]) -> list[Row]:
    """Rows of indices, in order, that hold every pair of values of two axes.

    Greedy: a row is begun with a pair that is missing, of the longest axes first, and each other
    axis takes what brings the most missing pairs, of those what was taken least.
    """
    axes = sorted(range(len(sizes)), key=lambda axis: -sizes[axis])
    pairs = [
        (m, x, n, y)
        for m, n in combinations(axes, 2)
        for x, y in product(range(sizes[m]), range(sizes[n]))
    ]
    missing, taken, rows = set(pairs), Counter[tuple[int, int]](), []
    for m, x, n, y in pairs:
        if (m, x, n, y) not in missing:
            continue
        row = {m: x, n: y}
        for axis in axes:
            if axis not in row:
                row[axis] = max(
                    range(sizes[axis]),
                    key=lambda at: (
                        len(missing & _pairs_of(axes, row | {axis: at})),
                        -taken[axis, at],
                    ),
                )
        missing -= _pairs_of(axes, row)
        taken.update(row.items())
        rows.append(tuple(row[axis] for axis in range(len(sizes))))
    return sorted(rows)


def _pairs_of(axes: Sequence[int], row: dict[int, int]) -> set[Pair]:
    held = [axis for axis in axes if axis in row]
    return {(m, row[m], n, row[n]) for m, n in combinations(held, 2)}


def _named(value: Any, at: int) -> str:
    parts = value if isinstance(value, tuple) else (value,)
    if all(isinstance(part, str | int | None) for part in parts):
        return ", ".join(map(str, parts))
    return str(at)
