"""One run's figures: components, and NVML's series under the predicted levels."""

from itertools import pairwise

import pytest

import planner
from app import run_charts
from tests.app.test_measured import GIB, series
from tests.app.test_measured_charts import row


def level(name, gib):
    return run_charts.Level(name=name, size_bytes=int(gib * GIB), colour="#000000")


@pytest.fixture(scope="module")
def training():
    work = planner.Training(batch=2, sequence_tokens=512)
    deploy = planner.Deployment(gpu="h200", runtime="attnlab", dtype="bf16")
    return planner.estimate(planner.load_model("gpt2"), work, deploy)


def test_levels_rise_from_the_weights_to_what_the_device_has_in_use(estimates):
    memory = estimates["fits"].memory
    levels = {lv.name: lv.size_bytes for lv in run_charts.levels(estimates["fits"])}
    assert levels["weights"] == memory.weights_bytes
    assert levels["+ KV cache"] == memory.weights_bytes + memory.kv_cache_bytes
    assert levels["peak allocated"] == memory.peak_allocated_bytes
    assert levels["peak reserved"] == memory.peak_reserved_bytes
    assert levels["device used"] == memory.device_used_bytes
    assert list(levels.values()) == sorted(levels.values())


def test_what_others_held_is_below_every_level(estimates):
    alone, beside = (
        run_charts.levels(estimates["fits"], others_bytes=others) for others in (0, GIB)
    )
    assert {b.size_bytes - a.size_bytes for a, b in zip(alone, beside, strict=True)} == {GIB}


def test_in_training_gradients_and_states_take_the_place_of_the_cache(training):
    memory = training.memory
    levels = {lv.name: lv.size_bytes for lv in run_charts.levels(training)}
    expected = memory.weights_bytes + memory.gradients_bytes + memory.optimizer_bytes
    assert levels["+ gradients, states"] == expected
    assert "+ KV cache" not in levels


def test_the_series_is_drawn_in_gib_with_a_dashed_line_for_every_level():
    figure = run_charts.series(series(), [level("weights", 15), level("device used", 18)])
    (curve,) = figure.data
    assert curve.y == (1, 1, 15, 17)
    dashed = {s.name: s.y0 for s in figure.layout.shapes if s.line.dash == "dash"}
    assert dashed == {"weights": 15, "device used": 18}
    assert figure.layout.yaxis.range[1] > 18
    assert figure.layout.yaxis.range[0] == 0


def test_marks_name_what_begins_and_the_end_is_not_one_of_them():
    figure = run_charts.series(series(), [])
    names = [a.text for a in figure.layout.annotations]
    assert names == ["load", "prefill"]
    begins = [s.x0 for s in figure.layout.shapes if s.name == "prefill begins"]
    assert begins == [2.0]


def test_the_flat_beginning_is_cut_to_a_quarter_of_the_rest():
    times = (0.0, 1.0, 2.0, 3.0, 3.2, 4.0)
    figure = run_charts.series(series(times=times, used=(1, 1, 1, 1, 15, 17)), [])
    assert figure.layout.xaxis.range == pytest.approx((3.2 - 0.8 / 4, 4.0))


def test_close_to_the_peak_the_axis_begins_below_the_weights():
    figure = run_charts.series(series(), [level("weights", 15), level("used", 18)], near_peak=True)
    low, high = figure.layout.yaxis.range
    assert 13 < low < 15
    assert high > 18


@pytest.mark.parametrize(
    ("times", "used"), [((), ()), ((0.0, 1.0), (None, None)), ((0.0, 1.0), (1, None))]
)
def test_a_driver_that_said_nothing_leaves_the_levels(times, used):
    seen = series(times=times, used=used)
    figure = run_charts.series(seen, [level("weights", 15)])
    assert [s.name for s in figure.layout.shapes if s.line.dash == "dash"] == ["weights"]
    assert run_charts.series_in_words(seen, []).endswith("Predicted levels: none.")


def test_words_have_the_peak_the_marks_and_the_levels():
    words = run_charts.series_in_words(series(), [level("weights", 15)])
    assert "at most 17.00 GiB" in words
    assert "prefill at 2.00 s" in words
    assert "weights 15.00 GiB" in words


@pytest.mark.parametrize(
    "wanted", [[], [5.0], [5.0, 6.0, 7.0], [1.0, 98.0, 99.0, 100.0], [50.0] * 5]
)
def test_labels_are_pushed_apart_in_order_and_stay_inside(wanted):
    placed = run_charts.spread(wanted, 17, 100)
    assert all(after - before >= 17 - 1e-9 for before, after in pairwise(placed))
    assert all(place <= 100 for place in placed)
    if len(wanted) == 1:
        assert placed == wanted


def test_components_are_bars_measured_and_lines_predicted():
    rows = [row(), row("kv_cache_bytes", None, 2**29), row("ttft_s", 1.0, 2.0)]
    bars, lines = run_charts.components(rows).data
    assert (list(bars.y), list(bars.x)) == (["Weights", "KV cache"], [1.0, 0.5])
    assert (list(lines.y), list(lines.x)) == (["Weights"], [2.0])
    assert "KV cache measured 512.00 MiB, not predicted" in run_charts.components_in_words(rows)


def test_small_components_are_drawn_in_mib():
    bars, _ = run_charts.components([row(measured=2**20)]).data
    assert list(bars.x) == [1.0]
