"""The figures of the page Measured, read off the figures: signs, places, splits."""

import pytest

from app import measured_charts
from profiles.rows import Row


def row(quantity="weights_bytes", predicted=2.0 * 2**30, measured=2**30, **more):
    values = {
        "device": "h200",
        "suite": None,
        "split": "held-out",
        "model": "tiny",
        "phase": "prefill",
        "record": "r",
    }
    return Row(
        quantity=quantity,
        predicted=predicted,
        measured=measured,
        relative_error=None if predicted is None else predicted / measured - 1,
        **(values | more),
    )


def test_errors_keep_their_sign_and_stand_on_the_line_of_their_quantity():
    rows = [row(), row("ttft_s", 1.0, 2.0), row("kv_cache_bytes", None)]
    figure = measured_charts.residuals(rows, by="quantity")
    axis = figure.layout.yaxis
    lines = dict(zip(axis.ticktext, axis.tickvals, strict=True))
    points = {point.name: (point.x[0], round(point.y[0])) for point in figure.data}
    assert points == {"Weights": (100.0, lines["Weights"]), "TTFT": (-50.0, lines["TTFT"])}
    low, high = figure.layout.xaxis.range
    assert low < -50
    assert high > 100


def test_by_model_every_model_has_a_line_and_the_quantities_a_legend():
    rows = [row(model=name) for name in ("b", "a")] + [row("kv_cache_bytes", model="a")]
    figure = measured_charts.residuals(rows, by="model")
    assert list(figure.layout.yaxis.ticktext) == ["a", "b"]
    assert figure.layout.showlegend
    assert [trace.name for trace in figure.data if trace.showlegend] == ["Weights", "KV cache"]


def test_held_out_points_are_full_and_calibration_hollow_on_lanes_of_their_own():
    rows = [row(split=split) for split in ("held-out", "calibration", None)]
    traces = measured_charts.residuals(rows, by="quantity").data
    assert [t.marker.symbol for t in traces] == ["square", "square-open-dot", "square-open"]
    assert len({t.y[0] for t in traces}) == 3
    assert [t.showlegend for t in traces] == [True, False, False]


def test_every_quantity_has_a_colour_and_a_symbol_that_no_other_has_in_its_figure():
    assert set(measured_charts.LOOKS) == set(measured_charts.QUANTITIES)
    for unit in ("_bytes", "_s"):
        looks = [look for name, look in measured_charts.LOOKS.items() if name.endswith(unit)]
        assert len({colour for colour, _ in looks}) == len(looks)
        assert len({symbol for _, symbol in looks}) == len(looks)


@pytest.mark.parametrize("error", [0.0, 1e-9, 0.5, -0.9, 30.0])
def test_zero_is_never_at_the_edge_of_the_axis(error):
    one = row(predicted=(1 + error) * 2**30)
    low, high = measured_charts.residuals([one], by="quantity").layout.xaxis.range
    assert low < min(0, 100 * error) <= max(0, 100 * error) < high
    assert min(-low, high) >= 0.15 * (high - low)


def test_parity_draws_its_own_unit_against_the_line_of_equality():
    rows = [row(), row("ttft_s", 0.001, 0.002)]
    figure = measured_charts.parity(rows, unit="bytes")
    line, memory = figure.data
    assert line.x == line.y
    assert (memory.x, memory.y) == ((1.0,), (2.0,))
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log"
    assert measured_charts.parity(rows, unit="s").data[1].x == (2.0,)  # ms


def test_without_rows_figures_are_empty_and_no_error():
    assert len(measured_charts.parity([], unit="s").data) == 1
    assert len(measured_charts.residuals([], by="quantity").data) == 0
    assert len(measured_charts.heat_map([]).data) == 1
    assert measured_charts.heat_map_in_words([]) == "Mean signed errors: none"


def test_the_heat_map_has_the_mean_signed_error_of_each_model_and_quantity():
    rows = [row(predicted=1.02 * 2**30), row(), row("ttft_s", 1.0, 2.0, model="other")]
    figure = measured_charts.heat_map(rows)
    heat = figure.data[0]
    assert (list(heat.y), list(heat.x)) == (["other", "tiny"], ["Weights", "TTFT"])
    assert list(heat.z[0]) == [None, -50.0]
    assert heat.z[1][0] == pytest.approx(51)
    assert [list(line) for line in heat.text] == [["", "-50"], ["+51", ""]]
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "category"
    assert "+51.00% of Weights of tiny" in measured_charts.heat_map_in_words(rows)


@pytest.mark.parametrize(
    ("error", "text"),
    [(0.0, "0"), (1e-7, "≈ 0"), (-0.012, "-1.2"), (0.0997, "+10"), (-0.5, "-50")],
)
def test_a_cell_is_zero_only_where_the_error_is_nothing(error, text):
    assert measured_charts._short(error) == text


def test_errors_in_words_have_the_numbers():
    words = measured_charts.residuals_in_words([row(), row("ttft_s", 1.0, 2.0)], title="T")
    assert "Weights (held-out): 1 errors, mean +100.00%, worst 100.00%" in words
    assert "TTFT (held-out): 1 errors, mean -50.00%" in words


def test_names_from_a_record_are_not_markup():
    one = row(model="<script>")
    text = measured_charts.residuals([one], by="quantity").data[0].text[0]
    assert "<b>Weights +100.00%</b>" in text
    assert "&lt;script" in text
    assert measured_charts.residuals([one], by="model").layout.yaxis.ticktext == ("&lt;script>",)
    assert measured_charts.heat_map([one]).data[0].y == ("&lt;script>",)
