"""The figures show the planner's numbers: sums, places and signs, read off the figures."""

import itertools

import pytest

from app import charts, measured_charts, run_charts

KINDS = ["fits", "too large", "pool", "pool of nothing", "cpu"]


def luminance(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stacked_bar_sums_to_the_total(estimates, kind):
    e = estimates[kind]
    bars = [bar for bar in charts.memory_breakdown(e).data if bar.name != "Unused pool"]
    assert sum(bar.x[0] for bar in bars) * 2**30 == pytest.approx(e.memory.total_bytes, abs=1)


@pytest.mark.parametrize("kind", ["pool", "pool of nothing"])
def test_with_the_unused_pool_it_sums_to_what_the_device_has_in_use(estimates, kind):
    e = estimates[kind]
    bars = charts.memory_breakdown(e).data
    assert bars[-1].name == "Unused pool"
    assert sum(bar.x[0] for bar in bars) * 2**30 == pytest.approx(e.memory.device_used_bytes, abs=1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_part_begins_where_the_one_before_ends(estimates, kind):
    bars = charts.memory_breakdown(estimates[kind]).data
    for one, after in itertools.pairwise(bars):
        assert after.base[0] == pytest.approx(one.base[0] + one.x[0])
    assert all(bar.base[0] == bar.base[1] and bar.x[0] == bar.x[1] for bar in bars)


@pytest.mark.parametrize("kind", KINDS)
def test_the_capacity_line_stands_at_the_memory_of_the_device(estimates, kind):
    e = estimates[kind]
    figure = charts.memory_breakdown(e)
    (line,) = [shape for shape in figure.layout.shapes if shape.name == "capacity"]
    assert line.x0 == line.x1 == e.gpu.memory_bytes / 2**30
    assert figure.layout.xaxis.range[1] > line.x0


def test_what_is_beyond_the_capacity_is_shaded_only_where_something_is(estimates):
    def shaded(kind):
        shapes = charts.memory_breakdown(estimates[kind]).layout.shapes
        return [s for s in shapes if s.name == "beyond the capacity"]

    assert shaded("fits") == []
    assert len(shaded("too large")) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_timeline_peaks_where_the_estimate_does(estimates, kind):
    e = estimates[kind]
    figure = charts.timeline(e)
    cache, activations, peak = figure.data
    heights = [c + a for c, a in zip(cache.y, activations.y, strict=True)]
    scale = {" GiB": 2**30, " MiB": 2**20}[figure.layout.yaxis.ticksuffix]
    assert max(heights) * scale == pytest.approx(e.peak.live_bytes, abs=1)
    assert heights[peak.x[0]] == peak.y[0] == max(heights)
    layer = "" if e.peak.layer is None else f", layer {e.peak.layer}"
    assert peak.text[0].startswith(f"{e.peak.op}{layer}: ")
    assert figure.layout.yaxis.range[1] > peak.y[0]
    assert f"peaks at {e.peak.op}" in charts.timeline_in_words(e)


@pytest.mark.parametrize("kind", KINDS)
def test_the_timeline_has_a_tick_for_at_most_nine_layers_in_order(estimates, kind):
    axis = charts.timeline(estimates[kind]).layout.xaxis
    assert 0 < len(axis.tickvals) <= 9
    assert list(axis.tickvals) == sorted(axis.tickvals)
    assert axis.ticktext[0] == "layer 0"


def test_every_part_has_its_size_written_on_its_row(estimates):
    figure = charts.memory_breakdown(estimates["fits"])
    assert "Weights  <b>14.96 GiB</b>" in figure.layout.yaxis.categoryarray
    assert "Weights 14.96 GiB" in charts.memory_in_words(estimates["fits"])


@pytest.mark.parametrize("background", ["#ffffff", "#0e1117"])
def test_fills_are_legible_on_light_and_dark_pages(background):
    """WCAG 2.1, 1.4.11: 3 to 1 for what a graphic is understood by."""
    looks = {colour for colour, _ in measured_charts.LOOKS.values()}
    fills = {*charts.COLOURS.values(), *looks, run_charts.USED}
    assert all(contrast(colour, background) >= 3 for colour in fills)
