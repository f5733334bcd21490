"""The ledger behind an estimate: every number a row, with its formula and the numbers put in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd

Component = Literal["weights", "kv_cache", "gradients", "optimizer", "activations", "overhead"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """`size_bytes` is `count` times `formula` with `values` put in for its symbols.

    A formula is written with ·, /, %, +, min() and ceil(); a measured constant has its
    source as `note`.
    """

    component: Component
    item: str
    count: int
    formula: str
    values: tuple[tuple[str, int], ...]
    size_bytes: int
    note: str = ""

    @property
    def substituted(self) -> str:
        """The formula with its symbols replaced by their numbers."""
        numbers = dict(self.values)
        return re.sub(
            r"[A-Za-z_]\w*", lambda m: str(numbers.get(m.group(), m.group())), self.formula
        )


def total_bytes(rows: Sequence[Row], component: Component | None = None) -> int:
    """Sum of all rows, or of one component's."""
    return sum(r.size_bytes for r in rows if component in (None, r.component))


def ledger_table(rows: Sequence[Row]) -> pd.DataFrame:
    """component, item, count, formula, substituted, bytes, note of every row."""
    import pandas as pd

    columns = ["component", "item", "count", "formula", "substituted", "bytes", "note"]
    return pd.DataFrame(
        [
            [r.component, r.item, r.count, r.formula, r.substituted, r.size_bytes, r.note]
            for r in rows
        ],
        columns=columns,
    )


def buffer_row(
    item: str, count: int, formula: str, values: tuple[tuple[str, int], ...], size_bytes: int
) -> Row:
    """What a module holds besides its parameters; `size_bytes` of all `count` of them."""
    return Row(
        component="weights",
        item=f"{item} (buffer)",
        count=count,
        formula=formula,
        values=values,
        size_bytes=size_bytes,
    )


def parameter_rows(groups: Mapping[str, tuple[int, int]], b: int, *, note: str) -> list[Row]:
    """(tensors, elements) of every group of parameters, of `b` bytes each."""
    return [
        Row(
            component="weights",
            item=f"{group.replace('_', ' ')}, {tensors} tensor{'s' * (tensors > 1)}",
            count=1,
            formula="parameters · b",
            values=(("parameters", elements), ("b", b)),
            size_bytes=elements * b,
            note=note,
        )
        for group, (tensors, elements) in groups.items()
    ]


def constant_row(item: str, size_bytes: int, note: str) -> Row:
    """A figure of the overhead that is known and not computed; `note` says from where."""
    return Row(
        component="overhead",
        item=item,
        count=1,
        formula="constant",
        values=(("constant", size_bytes),),
        size_bytes=size_bytes,
        note=note,
    )
