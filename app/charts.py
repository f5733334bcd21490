"""Planner types in, plotly figures out. Nothing here knows streamlit.

Text takes its colour from the page's theme; the fills are legible on white and on near-black
(contrast ≥ 3, WCAG 1.4.11) and told apart without colour too: every bar stands on its own named
row, every kind of point has its own symbol.
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

import planner
from planner.format import gib, of_quantity, of_value
from planner.timeline import Moment

GIB = 2**30

COLOURS = {
    "Weights": "#3A66C9",
    "KV cache": "#CF7C00",
    "Activations": "#1B9A82",
    "Gradients": "#B8860B",
    "Optimizer": "#7A6FD0",
    "Overhead": "#A45AA8",
    "Unused pool": "#CF7C00",
}
LINE = "#7F858F"
OVER = "#D1495B"

TOTAL = "Total"


def memory_parts(estimate: planner.Estimate) -> list[tuple[str, int]]:
    """The named parts of the device's memory, bottom up; in vllm with the pool's unused rest."""
    m = estimate.memory
    parts = [
        ("Weights", m.weights_bytes),
        ("KV cache", m.kv_cache_bytes),
        ("Activations", m.activations_bytes),
        ("Overhead", m.overhead_bytes),
    ]
    if isinstance(estimate.work, planner.Training):
        parts[1:2] = [("Gradients", m.gradients_bytes), ("Optimizer", m.optimizer_bytes)]
    if estimate.kv_pool_bytes is not None:
        parts.append(("Unused pool", m.unused_pool_bytes))
    return parts


def memory_breakdown(estimate: planner.Estimate) -> go.Figure:
    """The parts stacked in one bar, each again on a row of its own, before the device's memory."""
    capacity = estimate.gpu.memory_bytes / GIB
    parts = memory_parts(estimate)
    total = sum(size for _, size in parts)
    title = "In use" if estimate.kv_pool_bytes is not None else TOTAL
    rows = [_row_label(title, total), *(_row_label(*part) for part in parts)]
    figure = go.Figure()
    start = 0
    for (name, size), row in zip(parts, rows[1:], strict=True):
        figure.add_bar(
            name=name,
            orientation="h",
            y=[rows[0], row],
            x=[size / GIB, size / GIB],
            base=[start / GIB, start / GIB],
            width=[0.72, 0.4],
            marker={
                "color": COLOURS[name],
                "pattern": {"shape": "/" if name == "Unused pool" else "", "size": 6},
                "line": {"width": 0},
            },
            hovertemplate=f"{name}<br>{gib(size)}<br>{size:,} B<extra></extra>",
        )
        start += size
    longest = max(total / GIB, capacity)
    if total / GIB > capacity:
        figure.add_vrect(
            name="beyond the capacity",
            x0=capacity,
            x1=longest * 1.04,
            fillcolor=OVER,
            opacity=0.12,
            line_width=0,
            layer="below",
        )
    figure.add_shape(
        name="capacity",
        type="line",
        x0=capacity,
        x1=capacity,
        y0=0,
        y1=1,
        yref="paper",
        line={"color": LINE, "width": 2, "dash": "dash"},
    )
    figure.add_annotation(
        name="capacity",
        text=f"{estimate.gpu.label}: {gib(estimate.gpu.memory_bytes)}",
        x=capacity,
        y=1,
        yref="paper",
        xanchor="right" if capacity > longest / 2 else "left",
        yanchor="bottom",
        font_size=13,
        showarrow=False,
    )
    figure.update_layout(
        barmode="overlay",
        showlegend=False,
        height=60 + 40 * len(rows),
        margin={"l": 8, "r": 8, "t": 32, "b": 8},
        dragmode=False,
    )
    figure.update_xaxes(
        range=[0, longest * 1.04], ticksuffix=" GiB", nticks=6, title=None, fixedrange=True
    )
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=rows[::-1],
        tickfont_size=13,
        automargin=True,
        showgrid=False,
        fixedrange=True,
    )
    return figure


def memory_in_words(estimate: planner.Estimate) -> str:
    """The same figure for who cannot see it."""
    parts = ", ".join(f"{name} {gib(size)}" for name, size in memory_parts(estimate))
    return (
        f"Memory of {estimate.model.name}: {parts}; "
        f"{estimate.gpu.label} has {gib(estimate.gpu.memory_bytes)}."
    )


def timeline(estimate: planner.Estimate) -> go.Figure:
    """What the pass with the peak has made, op by op: cache or gradients, activations; the peak."""
    moments = estimate.moments()
    where = _peak_index(moments)
    top = moments[where].live_bytes
    scale, unit = (GIB, "GiB") if top >= GIB else (2**20, "MiB")
    figure = go.Figure()
    hover = [escaped(f"{m.op}{'' if m.layer is None else f', layer {m.layer}'}") for m in moments]
    below = ("KV cache", [m.cache_bytes for m in moments])
    if isinstance(estimate.work, planner.Training):
        below = ("Gradients", [m.gradient_bytes for m in moments])
    for name, sizes in (below, ("Activations", [m.activation_bytes for m in moments])):
        figure.add_scatter(
            name=name,
            mode="lines",
            x=list(range(len(moments))),
            y=[size / scale for size in sizes],
            stackgroup="live",
            line={"shape": "hv", "width": 1, "color": COLOURS[name]},
            fillpattern={"shape": "" if name == "Activations" else "/", "size": 6},
            text=[f"{op}<br>{name} {gib(size)}" for op, size in zip(hover, sizes, strict=True)],
            hovertemplate="%{text}<extra></extra>",
        )
    figure.add_scatter(
        name="Peak",
        mode="markers+text",
        x=[where],
        y=[top / scale],
        marker={"color": OVER, "symbol": "diamond", "size": 12},
        text=[f"{hover[where]}: {gib(top)}"],
        textposition=f"top {'left' if where > len(moments) / 2 else 'right'}",
        hovertemplate="%{text}<extra></extra>",
    )
    starts = [(index, f"layer {layer}") for index, layer in _layer_starts(moments)]
    if isinstance(estimate.work, planner.Training):
        phases = [moment.phase for moment in moments]
        starts = [(phases.index(phase), phase) for phase in dict.fromkeys(phases)]
    figure.update_layout(**LAYOUT, height=320)
    figure.update_xaxes(
        tickvals=[index for index, _ in starts],
        ticktext=[word for _, word in starts],
        showgrid=False,
        title=None,
        fixedrange=True,
    )
    figure.update_yaxes(
        range=[0, 1.15 * top / scale or 1],
        ticksuffix=f" {unit}",
        nticks=6,
        title=None,
        fixedrange=True,
    )
    return figure


def timeline_in_words(estimate: planner.Estimate) -> str:
    """The same figure for who cannot see it."""
    moments = estimate.moments()
    top = moments[_peak_index(moments)]
    layer = "" if top.layer is None else f" of layer {top.layer}"
    beside = f"{gib(top.cache_bytes)} of KV cache"
    if isinstance(estimate.work, planner.Training):
        beside = f"{gib(top.gradient_bytes)} of gradients"
    return (
        f"Memory beside the weights through {len(moments):,} ops: in the {estimate.peak_phase} it "
        f"peaks at {top.op}{layer} with {beside} and "
        f"{gib(top.activation_bytes)} of activations."
    )


def _peak_index(moments: Sequence[Moment]) -> int:
    return max(range(len(moments)), key=lambda index: moments[index].live_bytes)


def _layer_starts(moments: Sequence[Moment]) -> list[tuple[int, int]]:
    """(index, layer) of the first op of some layers, evenly: at most nine ticks."""
    made = [op for op, moment in enumerate(moments) if moment.layer is None]
    first = made[0] if made else 0  # before it: caches that the pass finds
    starts: dict[int, int] = {}
    for index, moment in enumerate(moments):
        if moment.layer is not None and index >= first:
            starts.setdefault(moment.layer, index)
    every = -(-len(starts) // 9) or 1
    return [(index, layer) for layer, index in sorted(starts.items()) if layer % every == 0]


def label(quantity: str) -> str:
    """A quantity's name as people read it."""
    return of_quantity(quantity)


def value(quantity: str, number: float | None) -> str:
    """A quantity's value with its unit."""
    if number is None:
        return "—"
    return of_value(quantity, number)


LAYOUT = {
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0, "title": None},
    "showlegend": True,
    "dragmode": False,
}


def _row_label(name: str, size: int) -> str:
    return f"{name}  <b>{gib(size)}</b>"


def escaped(text: str) -> str:
    """Text that a figure does not take for markup."""
    return text.replace("&", "&amp;").replace("<", "&lt;")
