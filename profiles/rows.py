"""A row: one quantity of one record, predicted and measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

QUANTITIES = (
    "weights_bytes",
    "kv_cache_bytes",
    "gradients_bytes",
    "optimizer_bytes",
    "peak_live_bytes",
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "device_used_bytes",
    "ttft_s",
    "tpot_s",
    "new_tpot_s",
    "replay_s",
    "step_s",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One quantity of one record, predicted and measured, in the quantity's own unit.

    `predicted` is None where the planner refuses the record's configuration; `relative_error` is
    predicted / measured − 1, None where that has no meaning. `traced`: the same module on fake
    tensors, where that was asked for and has the quantity.
    """

    device: str
    suite: str | None
    split: str | None
    model: str
    phase: str
    quantity: str
    predicted: float | None
    measured: float
    relative_error: float | None
    record: str
    traced: float | None = None


def relative_error(prediction: float | None, value: float) -> float | None:
    """Prediction / value − 1; of nothing measured only nothing is right."""
    if prediction is None:
        return None
    if value == 0:
        return 0.0 if prediction == 0 else None
    return prediction / value - 1


def to_frame(rows: Iterable[Row]) -> pd.DataFrame:
    """The rows as a table, one column a field."""
    import pandas as pd

    return pd.DataFrame([asdict(row) for row in rows], columns=list(Row.__dataclass_fields__))
