"""Figures of the page Explore: the map of what fits, longest contexts, a change by component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from app.charts import LINE, OVER
from planner.format import gib

FITS, NOT = "#1B9A82", OVER
SCALE = [[0, "#E58C98"], [0.4999, "#F7D9DD"], [0.5, "#F6E3AE"], [0.6, "#D3EDE7"], [1, "#6CC0AE"]]
"""Fills of cells, light enough for INK in every one of them (contrast ≥ 7)."""
INK = "#20242C"
MEASURED = " ◆"
"""What stands beside the number of a cell near which something was measured."""
MARGIN = {"l": 8, "r": 8, "t": 8, "b": 8}
KV_COLOURS = ("#3A66C9", "#CF7C00", "#1B9A82", "#A45AA8", "#7A6FD0", "#7F858F")


def fit_map(table: pd.DataFrame, *, measured: Sequence[tuple[int, int]] = ()) -> go.Figure:
    """Headroom of every cell as a share of the GPU's memory; refused cells stay empty.

    `measured`: (batch, context) of records, marked on the cell that is nearest.
    """
    batches, contexts = (sorted(table[n].unique().tolist()) for n in ("batch", "context_tokens"))
    cells = table.set_index(["batch", "context_tokens"])
    marks = {(_nearest(batches, b), _nearest(contexts, c)) for b, c in measured}
    shares, texts, hovers = [], [], []
    for batch in batches:
        rows = [cells.loc[(batch, context)] for context in contexts]
        shares.append([_share(row) for row in rows])
        near = [MEASURED if (batch, context) in marks else "" for context in contexts]
        texts.append(
            [
                "" if row["refused"] else f"{_short(row['headroom_bytes'])}{mark}"
                for row, mark in zip(rows, near, strict=True)
            ]
        )
        hovers.append(
            [
                f"{_cell(row)}{'<br>measured near here' if mark else ''}"
                for row, mark in zip(rows, near, strict=True)
            ]
        )
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            x=[_tokens(context) for context in contexts],
            y=[f"{batch:,}" for batch in batches],
            text=texts,
            hovertext=hovers,
            texttemplate="%{text}",
            textfont={"size": 11, "color": INK},
            hovertemplate="batch %{y}, context %{x}<br>%{hovertext}<extra></extra>",
            colorscale=SCALE,
            zmin=-1,
            zmax=1,
            showscale=False,
            xgap=2,
            ygap=2,
        )
    )
    figure.update_layout(
        height=110 + 34 * len(batches), margin=MARGIN, showlegend=False, dragmode=False
    )
    figure.update_xaxes(type="category", title="context, tokens", fixedrange=True, side="bottom")
    figure.update_yaxes(type="category", title="batch", fixedrange=True)
    return figure


def fit_map_in_words(table: pd.DataFrame) -> str:
    """The same map for who cannot see it."""
    known = table[table["refused"] == ""]
    fits = int(known["fits"].fillna(False).astype(bool).sum())
    return f"Map of {len(table)} cells of batch and context: {fits} fit, {len(known) - fits} do not"


def longest_contexts(lines: Mapping[str, Mapping[int, int]], *, limit: int | None) -> go.Figure:
    """For each KV dtype the longest context at every batch, on logarithmic axes."""
    figure = go.Figure()
    for (name, line), colour in zip(lines.items(), KV_COLOURS, strict=False):
        points = {batch: longest for batch, longest in line.items() if longest}
        figure.add_scatter(
            name=name,
            x=list(points),
            y=list(points.values()),
            mode="lines+markers",
            line={"color": colour, "width": 2},
            hovertemplate=f"{name}: batch %{{x:,}}, %{{y:,}} tokens<extra></extra>",
        )
    if limit is not None:
        figure.add_hline(
            y=limit,
            line={"color": LINE, "dash": "dash"},
            annotation_text=f"the model's {limit:,} positions",
            annotation_position="bottom left",
        )
    figure.update_layout(
        height=340,
        margin=MARGIN,
        dragmode=False,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0, "title": None},
        showlegend=True,
    )
    seen = [n for line in lines.values() for n in line.values() if n]
    powers = [
        2**i for i in range(32) if min(seen, default=1) / 2 <= 2**i <= 2 * max(seen, default=1)
    ]
    batches = sorted({batch for line in lines.values() for batch in line})
    ticks = {"tickvals": batches, "ticktext": [f"{batch:,}" for batch in batches]}
    figure.update_xaxes(type="log", title="batch", **ticks, fixedrange=True)
    ticks = {"tickvals": powers, "ticktext": [_tokens(n) for n in powers]}
    figure.update_yaxes(type="log", title="longest context, tokens", **ticks, fixedrange=True)
    return figure


def longest_in_words(lines: Mapping[str, Mapping[int, int]]) -> str:
    """The same lines for who cannot see them."""
    said = [
        f"{name} {line[min(line)]:,} tokens at batch {min(line)}" for name, line in lines.items()
    ]
    return f"Longest context by KV dtype: {', '.join(said)}"


def change(table: pd.DataFrame) -> go.Figure:
    """What a change adds and takes, component by component, then in all."""
    sums = table[table["item"] == "in all"]
    changes = sums["change_bytes"].tolist()
    names = [name.replace("_", " ") for name in sums["component"]]
    figure = go.Figure(
        go.Waterfall(
            orientation="h",
            y=names,
            x=[size / 2**30 for size in changes],
            measure=["relative"] * (len(names) - 1) + ["total"],
            text=[("+" if size > 0 else "") + gib(size) for size in changes],
            textposition="outside",
            hovertemplate="%{y}: %{text}<extra></extra>",
            increasing={"marker": {"color": OVER}},
            decreasing={"marker": {"color": FITS}},
            totals={"marker": {"color": "#3A66C9"}},
            connector={"line": {"color": LINE, "width": 1}},
        )
    )
    most = max((abs(size) for size in changes), default=0) / 2**30 or 1
    figure.update_layout(height=80 + 40 * len(names), margin=MARGIN, dragmode=False)
    figure.update_xaxes(ticksuffix=" GiB", fixedrange=True, range=[-1.5 * most, 1.5 * most])
    figure.update_yaxes(type="category", autorange="reversed", fixedrange=True)
    return figure


def change_in_words(table: pd.DataFrame) -> str:
    """The same figure for who cannot see it."""
    sums = table[table["item"] == "in all"]
    said = [
        f"{name} {gib(size)}"
        for name, size in zip(sums["component"], sums["change_bytes"], strict=True)
    ]
    return f"From A to B: {', '.join(said)}"


def _share(row: pd.Series) -> float | None:  # type: ignore[type-arg]
    """Headroom of the memory, from −1 on; what fits lies above 0, what only waits just below."""
    if row["refused"]:
        return None
    share = float(row["headroom_bytes"]) / float(row["gpu_memory_bytes"])
    return max(share, 0.001) if row["fits"] else min(max(share, -1.0), -0.001)


def _cell(row: pd.Series) -> str:  # type: ignore[type-arg]
    if row["refused"]:
        return str(row["refused"])
    verdict = "fits" if row["fits"] else "does not fit"
    return (
        f"{verdict}, {gib(row['headroom_bytes'])} left<br>KV cache {gib(row['kv_cache_bytes'])}, "
        f"total {gib(row['total_bytes'])}"
    )


def _short(size: int) -> str:
    """Whole GiB, thousands of them with a k; tenths below ten."""
    number = size / 2**30
    if abs(number) >= 1000:
        return f"{number / 1000:.0f}k"
    return f"{number:.0f}" if abs(number) >= 10 else f"{number:.1f}"


def _tokens(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else f"{n:,}"


def _nearest(values: Sequence[int], wanted: int) -> int:
    return min(values, key=lambda value: abs(value.bit_length() - wanted.bit_length()))
