"""The figure of what others published: every signed error, on the line of its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import plotly.graph_objects as go

from app.charts import LINE, escaped, label, value
from app.measured_charts import LOOKS as MEASURED_LOOKS
from app.measured_charts import error_axes
from planner.format import percent
from profiles.published import PublishedRow
from profiles.published_latency import LatencyRow

PublishedAny: TypeAlias = PublishedRow | LatencyRow
LOOKS = {
    **MEASURED_LOOKS,
    "end_to_end_s": ("#A45AA8", "hexagon"),
    "tokens_per_s": ("#1B9A82", "square"),
}
ROW_HEIGHT = 40
LANE = 0.22
"""How far above or below the middle of its line the outermost quantity stands."""


def line_of(row: PublishedAny) -> str:
    """An engine's name, of memory the repository's."""
    return row.engine if isinstance(row, LatencyRow) else row.source


def errors(rows: Sequence[PublishedAny]) -> go.Figure:
    """Filled: the plan; hollow: with what the run's version is known to hold besides (memory)."""
    known = [row for row in rows if row.relative_error is not None]
    lines = list(dict.fromkeys(map(line_of, known)))
    place = {name: len(lines) - 1 - index for index, name in enumerate(lines)}
    lanes = _lanes(known)
    figure = go.Figure()
    figure.add_vline(x=0, line_color=LINE, line_width=1.5)
    drawn: list[float] = []
    for quantity in LOOKS:
        members = [row for row in known if row.quantity == quantity]
        for filled, error in ((True, _plain), (False, _named)):
            points = [(row, x) for row in members if (x := error(row)) is not None]
            if not points:
                continue
            drawn += [100 * x for _, x in points]
            figure.add_scatter(
                mode="markers",
                x=[100 * x for _, x in points],
                y=[place[line_of(row)] + lanes[line_of(row), quantity] for row, _ in points],
                name=label(quantity),
                legendgroup=quantity,
                showlegend=filled,
                marker=_marker(quantity, filled=filled),
                text=[_hover(row, x, filled=filled) for row, x in points],
                hovertemplate="%{text}<extra></extra>",
            )
    error_axes(figure, place, drawn, row_height=ROW_HEIGHT)
    return figure


def in_words(rows: Sequence[PublishedAny], *, title: str) -> str:
    """The same figure for who cannot see it."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.relative_error is not None:
            groups.setdefault((line_of(row), row.quantity), []).append(row.relative_error)
    parts = [
        f"{name}, {label(quantity)}: {len(found)} errors from {percent(min(found))} to "
        f"{percent(max(found))}"
        for (name, quantity), found in groups.items()
    ]
    return f"{title}, signed errors by source. {'; '.join(parts)}."


def _lanes(rows: Sequence[PublishedAny]) -> dict[tuple[str, str], float]:
    """How far above its line's middle a quantity stands: evenly, those that the line has."""
    lanes = {}
    for line in dict.fromkeys(map(line_of, rows)):
        present = {row.quantity for row in rows if line_of(row) == line}
        own = [quantity for quantity in LOOKS if quantity in present]
        middle = (len(own) - 1) / 2
        for index, quantity in enumerate(own):
            lanes[line, quantity] = LANE * (middle - index) / middle if middle else 0.0
    return lanes


def _plain(row: PublishedAny) -> float | None:
    return row.relative_error


def _named(row: PublishedAny) -> float | None:
    return row.named_error if isinstance(row, PublishedRow) and row.named_bytes else None


def _marker(quantity: str, *, filled: bool) -> dict[str, object]:
    colour, symbol = LOOKS[quantity]
    return {
        "color": colour,
        "symbol": symbol if filled else f"{symbol}-open",
        "size": 9,
        "opacity": 0.8 if filled else 1.0,
        "line": {"width": 0 if filled else 1.8},
    }


def _hover(row: PublishedAny, error: float, *, filled: bool) -> str:
    besides = "" if filled else " with what the version holds besides"
    return (
        f"<b>{label(row.quantity)} {percent(error)}{besides}</b><br>{escaped(line_of(row))}: "
        f"{escaped(row.model)} on {escaped(row.gpu)}, {escaped(row.run)}<br>predicted "
        f"{value(row.quantity, row.predicted)}, published {value(row.quantity, row.measured)}"
    )
