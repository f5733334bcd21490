"""Figures of one measured run: its parts, and the device's memory while it ran."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

import planner
from app.charts import GIB, LAYOUT, LINE, label
from app.measured_charts import LOOKS
from planner.format import gib, percent
from profiles.rows import Row
from profiles.sampler import Series

HEIGHT = 430
TOP, BOTTOM, RIGHT = 46, 44, 178
APART = 17
"""Pixels between two lines of text at the side."""

USED = "#1B9A82"
BAND = "rgba(127, 133, 143, 0.14)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """A predicted height to draw across the series."""

    name: str
    size_bytes: int
    colour: str


def levels(estimate: planner.Estimate, *, others_bytes: int = 0) -> list[Level]:
    """What the planner says the device holds, from the weights up; unknown ones are left out.

    `others_bytes`: what other processes held; the driver's figures have it too.
    """
    m = estimate.memory
    name, beside, colour = "+ KV cache", m.kv_cache_bytes, LOOKS["kv_cache_bytes"][0]
    if isinstance(estimate.work, planner.Training):
        name, colour = "+ gradients, states", LOOKS["gradients_bytes"][0]
        beside = m.gradients_bytes + m.optimizer_bytes
    sizes: list[tuple[str, int | None, str]] = [
        ("weights", m.weights_bytes, LOOKS["weights_bytes"][0]),
        (name, m.weights_bytes + beside, colour),
        ("peak allocated", m.peak_allocated_bytes, LOOKS["peak_allocated_bytes"][0]),
        ("peak reserved", m.peak_reserved_bytes, LOOKS["peak_reserved_bytes"][0]),
        ("device used", m.device_used_bytes, LOOKS["device_used_bytes"][0]),
    ]
    return [
        Level(name=name, size_bytes=size + others_bytes, colour=colour)
        for name, size, colour in sizes
        if size is not None
    ]


def series(seen: Series, predicted: Sequence[Level], *, near_peak: bool = False) -> go.Figure:
    """Used memory over time with the marks of the run, under the predicted levels.

    The flat beginning, before anything was loaded, is cut to a quarter of the rest. `near_peak`:
    the vertical axis begins just below the weights.
    """
    used = [(t, u / GIB) for t, u in zip(seen.time_s, seen.used_bytes, strict=True)
            if u is not None]  # fmt: skip
    heights = [level.size_bytes / GIB for level in predicted]
    top = max([height for _, height in used] + heights, default=1.0)
    low = 0.0
    if near_peak and heights:
        low = max(0.0, min(heights) - 0.35 * (top - min(heights)) - 0.02)
    high = top + 0.06 * (top - low)
    start, end = _rise_s(seen), seen.duration_s
    start = max(0.0, start - (end - start) / 4)
    figure = go.Figure()
    _bands(figure, seen, start, end)
    for level in predicted:
        figure.add_shape(
            name=level.name,
            type="line",
            x0=start, x1=end, y0=level.size_bytes / GIB, y1=level.size_bytes / GIB,
            line={"color": level.colour, "width": 1.6, "dash": "dash"},
        )  # fmt: skip
    figure.add_scatter(
        name="used, NVML",
        mode="lines",
        x=[t for t, _ in used],
        y=[height for _, height in used],
        line={"color": USED, "width": 2.2, "shape": "hv"},
        fill="tozeroy" if not low else None,
        fillcolor="rgba(27, 154, 130, 0.14)",
        hovertemplate="%{x:.2f} s: %{y:.2f} GiB<extra></extra>",
    )
    _side_labels(figure, predicted, low, high)
    figure.update_layout(**{**LAYOUT, "showlegend": False}, height=HEIGHT)
    figure.update_layout(margin={"l": 8, "r": RIGHT, "t": TOP, "b": BOTTOM})
    figure.update_xaxes(
        range=[start, end], ticksuffix=" s", title=None, showgrid=False, fixedrange=True
    )
    figure.update_yaxes(range=[low, high], ticksuffix=" GiB", nticks=7, title=None, fixedrange=True)
    return figure


def series_in_words(seen: Series, predicted: Sequence[Level]) -> str:
    """The same figure for who cannot see it."""
    peak = seen.peak_used_bytes()
    marks = ", ".join(f"{mark.name} at {mark.time_s:.2f} s" for mark in seen.marks)
    drawn = ", ".join(f"{level.name} {gib(level.size_bytes)}" for level in predicted)
    return (
        f"NVML's used memory over {seen.duration_s:.1f} s, at most "
        f"{'unknown' if peak is None else gib(peak)}; marks: {marks or 'none'}. "
        f"Predicted levels: {drawn or 'none'}."
    )


def components(rows: Iterable[Row]) -> go.Figure:
    """The memory of one run by component: measured as a full bar, predicted as a frame over it."""
    parts = [row for row in rows if row.quantity.endswith("_bytes")]
    scale, unit = (GIB, "GiB") if any(r.measured >= GIB for r in parts) else (2**20, "MiB")
    names = [label(row.quantity) for row in parts]
    figure = go.Figure()
    figure.add_bar(
        name="measured",
        orientation="h",
        x=[row.measured / scale for row in parts],
        y=names,
        width=0.62,
        marker={"color": [LOOKS[row.quantity][0] for row in parts], "opacity": 0.55},
        hovertemplate=f"%{{y}}: measured %{{x:.3f}} {unit}<extra></extra>",
    )
    known = [row for row in parts if row.predicted is not None]
    figure.add_scatter(
        name="predicted",
        mode="markers",
        x=[(row.predicted or 0.0) / scale for row in known],
        y=[label(row.quantity) for row in known],
        marker={
            "symbol": "line-ns",
            "size": 22,
            "line": {"width": 3, "color": [LOOKS[row.quantity][0] for row in known]},
        },
        text=[percent(r.relative_error) if r.relative_error else "exact" for r in known],
        hovertemplate=f"%{{y}}: predicted %{{x:.3f}} {unit}, %{{text}}<extra></extra>",
    )
    figure.update_layout(**{**LAYOUT, "showlegend": False}, height=50 + 34 * max(1, len(parts)))
    figure.update_xaxes(ticksuffix=f" {unit}", nticks=6, rangemode="tozero", fixedrange=True)
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=names[::-1],
        automargin=True,
        showgrid=False,
        fixedrange=True,
    )
    return figure


def components_in_words(rows: Iterable[Row]) -> str:
    """The same figure for who cannot see it."""
    parts = [
        f"{label(row.quantity)} measured {gib(row.measured)}, "
        + ("not predicted" if row.predicted is None else f"predicted {gib(row.predicted)}")
        for row in rows
        if row.quantity.endswith("_bytes")
    ]
    return f"Memory of this run: {'; '.join(parts)}."


def _rise_s(seen: Series) -> float:
    """When the device's memory first leaves where it was at the start."""
    known = [(t, u) for t, u in zip(seen.time_s, seen.used_bytes, strict=True) if u is not None]
    if not known:
        return 0.0
    at_start = known[0][1]
    most = max(u for _, u in known)
    return next((t for t, u in known if u - at_start > 0.02 * (most - at_start)), 0.0)


def _bands(figure: go.Figure, seen: Series, start: float, end: float) -> None:
    """A band from each mark to the next, every second one shaded, its name above."""
    marks = [mark for mark in seen.marks if mark.name != "end"]
    ends = [*(mark.time_s for mark in seen.marks), end]
    for index, mark in enumerate(marks):
        left, right = max(start, mark.time_s), min(end, ends[index + 1])
        if right <= left:
            continue
        if index % 2:
            figure.add_vrect(
                name=mark.name, x0=left, x1=right, fillcolor=BAND, line_width=0, layer="below"
            )
        figure.add_annotation(
            name=mark.name,
            text=mark.name,
            x=left,
            y=1,
            yref="paper",
            xanchor="left",
            yanchor="bottom",
            yshift=18 * (index % 2),
            font_size=13,
            showarrow=False,
        )
        if mark.time_s > start:
            figure.add_shape(
                name=f"{mark.name} begins",
                type="line",
                x0=left, x1=left, y0=0, y1=1, yref="paper",
                line={"color": LINE, "width": 1, "dash": "dot"},
            )  # fmt: skip


def _side_labels(figure: go.Figure, predicted: Sequence[Level], low: float, high: float) -> None:
    """The levels' names at the right, pushed apart, each tied to its line."""
    inner = HEIGHT - TOP - BOTTOM
    shown = sorted((lv for lv in predicted if lv.size_bytes / GIB >= low),
                   key=lambda level: level.size_bytes)  # fmt: skip
    wanted = [inner * (level.size_bytes / GIB - low) / (high - low) for level in shown]
    for level, at, placed in zip(shown, wanted, spread(wanted, APART, inner), strict=True):
        figure.add_annotation(
            name=level.name,
            text=f"{level.name} {gib(level.size_bytes)}",
            x=1,
            xref="paper",
            y=level.size_bytes / GIB,
            ax=16,
            ay=at - placed,
            xanchor="left",
            yanchor="middle",
            showarrow=True,
            arrowhead=0,
            arrowwidth=1,
            arrowcolor=level.colour,
            font_size=12,
            align="left",
        )


def spread(wanted: Sequence[float], apart: float, most: float) -> list[float]:
    """Ascending places as near as can be to those wanted, `apart` from each other, ≤ `most`."""
    placed: list[float] = []
    for place in wanted:
        placed.append(place if not placed else max(place, placed[-1] + apart))
    over = max(0.0, placed[-1] - most) if placed else 0.0
    if over:
        placed[-1] -= over
        for index in range(len(placed) - 2, -1, -1):
            placed[index] = min(placed[index], placed[index + 1] - apart)
    return placed
