"""What is read off a sweep: a map of what fits, the longest contexts, the best rows, the front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from planner.errors import ConfigError, check_size
from planner.sweeps.cells import LABELS

if TYPE_CHECKING:
    import pandas as pd


def fit_map(table: pd.DataFrame, value: str = "headroom_bytes") -> pd.DataFrame:
    """One number of every cell as a float: a row a batch, a column a context; refused cells nan.

    Raises ConfigError for a table of several combinations, or without that column.
    """
    _check_columns(table, (value,))
    differing = [name for name in LABELS if table[name].nunique() > 1]
    if differing:
        raise ConfigError(f"{differing[0]} has several values: a map is of one combination")
    plain = table[["batch", "context_tokens"]].assign(value=_plain(table[value]))
    return plain.pivot(index="batch", columns="context_tokens", values="value")


def longest_contexts(table: pd.DataFrame) -> pd.DataFrame:
    """For each combination and batch the longest context such that it and all shorter ones of the
    table fit; 0 where not even the shortest does.
    """
    import pandas as pd

    keys = [*LABELS, "batch"]
    rows = []
    for names, part in table.groupby(keys, observed=True, sort=False):
        ordered = part.sort_values("context_tokens")
        fits = ordered["fits"].fillna(False).astype(bool).cummin()
        longest = int(ordered.loc[fits, "context_tokens"].max()) if fits.any() else 0
        rows.append((*names, longest))
    found = pd.DataFrame(rows, columns=[*keys, "longest_context_tokens"])
    for name in LABELS:
        found[name] = found[name].astype(table[name].dtype)
    return found


def top(table: pd.DataFrame, n: int, *, by: str, smallest: bool = False) -> pd.DataFrame:
    """The n best rows that fit, by one column."""
    check_size("n", n)
    _check_columns(table, (by,))
    fitting = _fitting(table)
    return fitting.sort_values(by, ascending=smallest, kind="stable").head(n)


def pareto_front(
    table: pd.DataFrame, *, minimise: Sequence[str] = (), maximise: Sequence[str] = ()
) -> pd.DataFrame:
    """The rows that fit and that no other is better than in all columns named.

    A row is left out if another is at least as good everywhere and better somewhere; equal rows
    stay.
    """
    import numpy as np

    _check_columns(table, (*minimise, *maximise))
    if not minimise and not maximise:
        raise ConfigError("minimise and maximise are empty: name at least one column")
    fitting = _fitting(table)
    signs = [(name, 1.0) for name in minimise] + [(name, -1.0) for name in maximise]
    costs = np.column_stack([sign * _plain(fitting[name]) for name, sign in signs])
    order = np.lexsort(costs.T[::-1])
    kept: list[int] = []
    front: list[Any] = []
    for place in order:  # sorted by the first column: only earlier rows can be better
        mine = costs[place]
        dominated = any((other <= mine).all() and (other < mine).any() for other in front)
        if not dominated:
            front.append(mine)
            kept.append(int(place))
    return fitting.iloc[sorted(kept)]


def _plain(column: pd.Series[Any]) -> Any:
    return column.astype(object).where(column.notna(), None).astype(float).to_numpy()


def _fitting(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["fits"].fillna(False).astype(bool)]


def _check_columns(table: pd.DataFrame, names: Sequence[str]) -> None:
    for name in names:
        if name not in table.columns:
            raise ConfigError(f"column {name!r} is not in the table: {', '.join(table.columns)}")
