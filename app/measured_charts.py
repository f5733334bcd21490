"""Figures of the page Measured: errors with their sign, predicted against measured, a heat map.

A quantity has one colour and one symbol in all of them; what the symbol is filled with is the
split: full is held-out, hollow is calibration, hollow with a dot is neither.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import plotly.graph_objects as go

from app.charts import GIB, LAYOUT, LINE, escaped, label, value
from planner.format import percent
from profiles.rows import QUANTITIES, Row
from profiles.summaries import summary

LOOKS = {
    "weights_bytes": ("#3A66C9", "square"),
    "kv_cache_bytes": ("#CF7C00", "diamond"),
    "gradients_bytes": ("#7E8A1E", "triangle-up"),
    "optimizer_bytes": ("#7A6FD0", "triangle-down"),
    "peak_live_bytes": ("#1B9A82", "pentagon"),
    "peak_allocated_bytes": ("#D1495B", "circle"),
    "peak_reserved_bytes": ("#A45AA8", "hexagon"),
    "device_used_bytes": ("#7F858F", "star"),
    "ttft_s": ("#3A66C9", "circle"),
    "tpot_s": ("#CF7C00", "diamond"),
    "new_tpot_s": ("#7E8A1E", "triangle-up"),
    "replay_s": ("#A45AA8", "hexagon"),
    "step_s": ("#1B9A82", "square"),
}
FILLED = {"held-out": "", "calibration": "-open", None: "-open-dot"}
LANES = {"held-out": 0.18, "calibration": -0.18, None: 0.0}
"""How far above the middle of its line a point stands."""

TOO_LITTLE, TOO_MUCH, INK = "#8FA9E3", "#E58C98", "#20242C"
"""Light enough for INK in every cell (contrast ≥ 5)."""
SATURATED = 0.05
"""The error at which a cell of the heat map has its full colour: the promise's worst."""


def residuals(rows: Iterable[Row], *, by: str) -> go.Figure:
    """Every signed relative error as a point on the line of its "quantity" or its "model"."""
    known = [row for row in rows if row.relative_error is not None]
    present = {row.quantity for row in known}
    lines = [label(q) for q in QUANTITIES if q in present]
    if by == "model":
        lines = sorted({row.model for row in known})
    place = {name: len(lines) - 1 - index for index, name in enumerate(lines)}

    def height(row: Row) -> float:
        name = row.model if by == "model" else label(row.quantity)
        return place[name] + LANES.get(row.split, 0.0)

    figure = go.Figure()
    figure.add_vline(x=0, line_color=LINE, line_width=1.5)
    for quantity, split, members, first in _groups(known):
        figure.add_scatter(
            mode="markers",
            x=[100 * (row.relative_error or 0.0) for row in members],
            y=[height(row) for row in members],
            **_looks(quantity, split, members, first=first),
        )
    error_axes(
        figure,
        place,
        [100 * (row.relative_error or 0.0) for row in known],
        row_height=30 if by == "model" else 36,
    )
    figure.update_layout(showlegend=by == "model")
    return figure


def error_axes(
    figure: go.Figure, place: Mapping[str, int], drawn: Sequence[float], *, row_height: int
) -> None:
    """Signed errors, in percent, along; the named lines, each at its height, above one another."""
    lines = max(1, len(place))
    figure.update_layout(**LAYOUT, height=110 + row_height * lines)
    figure.update_xaxes(
        range=reach(drawn),
        ticksuffix=" %",
        nticks=7,
        zeroline=False,
        title="predicted / measured − 1",
        fixedrange=True,
    )
    figure.update_yaxes(
        tickvals=list(place.values()),
        ticktext=[escaped(name) for name in place],
        range=[-0.6, lines - 0.4],
        automargin=True,
        zeroline=False,
        fixedrange=True,
    )


def reach(errors: Sequence[float]) -> list[float]:
    """An axis around all errors and zero, in percent: zero never stands at its edge."""
    low, high = min([0.0, *errors]), max([0.0, *errors])
    span = max(high - low, 1.0)
    return [min(low * 1.08, -0.25 * span), max(high * 1.08, 0.25 * span)]


def residuals_in_words(rows: Sequence[Row], *, title: str) -> str:
    """The same figure for who cannot see it."""
    parts = [
        f"{label(s.quantity)} ({s.split or 'no split'}): {s.n} errors, mean "
        f"{percent(s.mean_error)}, worst {s.worst_abs_error:.2%}"
        for s in summary(rows)
        if s.mean_error is not None and s.worst_abs_error is not None
    ]
    return f"{title}, signed relative errors. {'; '.join(parts)}."


def parity(rows: Iterable[Row], *, unit: str) -> go.Figure:
    """Predicted against measured on two logarithmic axes; on the line they are equal.

    `unit` is "bytes" (drawn in GiB) or "s" (drawn in ms): quantities that end in it are drawn.
    """
    scale, text = (GIB, "GiB") if unit == "bytes" else (1e-3, "ms")
    drawn = [
        row
        for row in rows
        if row.quantity.endswith(f"_{unit}") and row.predicted and row.measured > 0
    ]
    values = [v / scale for row in drawn for v in (row.predicted or 0.0, row.measured)]
    low, high = (min(values) / 1.6, max(values) * 1.6) if values else (0.1, 10.0)
    figure = go.Figure()
    figure.add_scatter(
        name="equal",
        mode="lines",
        x=[low, high],
        y=[low, high],
        line={"color": LINE, "width": 1.5, "dash": "dash"},
        hoverinfo="skip",
        showlegend=False,
    )
    for quantity, split, members, first in _groups(drawn):
        figure.add_scatter(
            mode="markers",
            x=[row.measured / scale for row in members],
            y=[(row.predicted or 0.0) / scale for row in members],
            **_looks(quantity, split, members, first=first),
        )
    figure.update_layout(**LAYOUT, height=430)
    for update, title in ((figure.update_xaxes, "measured"), (figure.update_yaxes, "predicted")):
        update(
            type="log",
            autorange=True,
            dtick="D1" if high / low < 20 else 1,
            title=f"{title}, {text}",
            fixedrange=True,
        )
    return figure


def heat_map(rows: Iterable[Row]) -> go.Figure:
    """Mean signed error of every model and quantity: blue is predicted too little."""
    errors = _mean_errors(rows)
    models = sorted({model for model, _ in errors})
    quantities = [q for q in QUANTITIES if any(q == quantity for _, quantity in errors)]
    means = [[errors.get((model, q), (None, 0))[0] for q in quantities] for model in models]
    figure = go.Figure(
        go.Heatmap(
            z=[[None if e is None else 100 * e for e in line] for line in means],
            x=[label(q) for q in quantities],
            y=[escaped(model) for model in models],
            text=[["" if e is None else _short(e) for e in line] for line in means],
            customdata=[[errors.get((model, q), (None, 0))[1] for q in quantities]
                        for model in models],
            texttemplate="%{text}",
            textfont={"size": 10, "color": INK},
            hovertemplate="%{y}, %{x}<br>mean error %{z:+.3f} % of %{customdata}<extra></extra>",
            hoverongaps=False,
            colorscale=[[0, TOO_LITTLE], [0.5, "#F1F2F4"], [1, TOO_MUCH]],
            zmin=-100 * SATURATED,
            zmax=100 * SATURATED,
            showscale=False,
            xgap=2,
            ygap=2,
        )
    )  # fmt: skip
    figure.update_layout(**LAYOUT, height=70 + 26 * max(1, len(models)))
    figure.update_xaxes(type="category", side="top", showgrid=False, fixedrange=True)
    figure.update_yaxes(
        type="category", autorange="reversed", automargin=True, showgrid=False, fixedrange=True
    )
    return figure


def heat_map_in_words(rows: Sequence[Row]) -> str:
    """The same figure for who cannot see it: how many cells there are, and the darkest."""
    errors = _mean_errors(rows)
    if not errors:
        return "Mean signed errors: none"
    model, quantity = max(errors, key=lambda cell: abs(errors[cell][0]))
    return (
        f"Mean signed error of {len(errors)} pairs of model and quantity; the largest is "
        f"{percent(errors[model, quantity][0])} of {label(quantity)} of {model}"
    )


def _mean_errors(rows: Iterable[Row]) -> dict[tuple[str, str], tuple[float, int]]:
    """(model, quantity) → mean signed error and the number of rows."""
    cells: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.relative_error is not None:
            cells.setdefault((row.model, row.quantity), []).append(row.relative_error)
    return {cell: (statistics.fmean(errors), len(errors)) for cell, errors in cells.items()}


def _short(error: float) -> str:
    """An error in a cell, in percent: 0 only where it is nothing."""
    if error == 0:
        return "0"
    if abs(error) < 0.0005:
        return "≈ 0"
    return f"{100 * error:+.{1 if abs(error) < 0.0995 else 0}f}"


def _groups(rows: Sequence[Row]) -> Iterable[tuple[str, str | None, list[Row], bool]]:
    """The rows by quantity and split, hollow points over full ones, and which has the legend."""
    for quantity in QUANTITIES:
        first = True
        for split in ("held-out", None, "calibration"):
            members = [r for r in rows if r.quantity == quantity and r.split == split]
            if members:
                yield quantity, split, members, first
                first = False


def _looks(
    quantity: str, split: str | None, members: Sequence[Row], *, first: bool
) -> dict[str, object]:
    colour, symbol = LOOKS[quantity]
    return {
        "name": label(quantity),
        "legendgroup": quantity,
        "showlegend": first,
        "marker": {
            "color": colour,
            "symbol": f"{symbol}{FILLED.get(split, '-open-dot')}",
            "size": 10,
            "opacity": 0.8 if split == "held-out" else 1.0,
            "line": {"width": 0 if split == "held-out" else 1.8},
        },
        "text": [_hover(row) for row in members],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _hover(row: Row) -> str:
    error = "no error" if row.relative_error is None else percent(row.relative_error)
    split = f", {row.split}" if row.split else ""
    return (
        f"<b>{label(row.quantity)} {error}</b><br>{escaped(row.model)} on {escaped(row.device)}, "
        f"{row.phase}{split}<br>predicted {value(row.quantity, row.predicted)}, "
        f"measured {value(row.quantity, row.measured)}"
    )
