"""The page Measured: filters, summaries, one run opened, links, and stores with faults."""

import json

import pytest

from app import measurements
from profiles import published, published_latency, records
from profiles.compare import compare, estimate_of
from profiles.sampler import Mark, Series
from tests.app.test_pages import captions, made, opened
from tests.profiles.made import measured

pytestmark = pytest.mark.usefixtures("store")

GIB = 2**30


def tables(app):
    """The tables of the page by a column that only they have."""
    columns = {"worst run": "errors", "component": "run", "method": "others", "record": "rows",
               "worst spread": "repeatability"}  # fmt: skip
    found = {}
    for frame in app.dataframe:
        for column, name in columns.items():
            if column in frame.value:
                found[name] = frame.value
    return found


def figures(app):
    return [json.loads(chart.proto.spec) for chart in app.get("plotly_chart")]


def on_h200(**changes):
    """A generation on an H200, memory as predicted, held out of a suite."""
    values = {"suite": "inference", "split": "held-out", "ttft_s": (0.1, 0.2)} | changes
    memory = estimate_of(measured(**values)).memory
    peaks = {
        "weights_bytes": memory.weights_bytes,
        "kv_cache_bytes": memory.kv_cache_bytes,
        "peak_allocated_bytes": memory.peak_allocated_bytes,
        "peak_reserved_bytes": memory.peak_reserved_bytes,
        "device_used_before_bytes": 0,
        "device_used_peak_bytes": memory.device_used_bytes,
    }
    return measured(**(peaks | values))


def series(times=(0.0, 1.0, 2.0, 3.0), used=(1, 1, 15, 17)):
    nothing = (None,) * len(times)
    return Series(
        started_utc="2026-01-01T00:00:00",
        interval_s=1.0,
        duration_s=4.0,
        nvml_s=0.01,
        time_s=tuple(times),
        used_bytes=tuple(None if u is None else u * GIB for u in used),
        power_w=nothing,
        sm_clock_hz=nothing,
        memory_clock_hz=nothing,
        temperature_c=nothing,
        utilisation=nothing,
        marks=(Mark(name="load", time_s=0.0), Mark(name="prefill", time_s=2.0),
               Mark(name="end", time_s=4.0)),
    )  # fmt: skip


def test_without_records_the_measured_page_says_how_to_make_one():
    app = opened("measured")
    assert app.info[0].value == "No measurements yet."
    assert app.code[0].value == (
        "planner profile llama-50m --batch 1 --prompt 512 --output 32 --device cpu"
    )
    assert "NVIDIA H200 SXM" in captions(app)


def test_what_others_published_is_a_view_of_its_own_with_sources_and_sentences(monkeypatch):
    """One run of memory and one of times, with their links at a commit."""
    memory = list(published.rows_of(0, published.load()[0]))
    times = list(published_latency.rows_of(0, published_latency.load()[0]))
    monkeypatch.setattr(measurements, "published", lambda: (memory, times))
    app = opened("measured", whose="Published by others")
    assert not app.exception
    shown = [f.value for f in app.dataframe if "licence" in f.value]
    assert [list(f["quantity"]) for f in shown] == [
        ["TTFT", "TPOT"],
        ["Peak, allocated", "Peak, reserved", "Device used"],
    ]
    for table in shown:
        assert all(
            url.startswith("https://github.com/huggingface/optimum-benchmark/blob/f75d9f93bb14")
            for url in table["source"]
        )
    assert shown[0]["published"].tolist() == ["33.6 ms", "25.8 ms"]
    assert "EPYC 7742" in shown[0]["why"][1]
    points = [[t["name"] for t in f["data"]] for f in figures(app)]
    assert points == [["TTFT", "TPOT"], ["Peak, allocated"] * 2 + ["Peak, reserved"] * 2
                      + ["Device used"] * 2]  # fmt: skip


def test_records_stand_beside_their_prediction_with_the_error(store):
    one = made()
    records.append(store, one)
    app = opened("measured")
    assert not app.warning
    rows, summary = (tables(app)[name] for name in ("rows", "errors"))
    errors = dict(zip(rows["quantity"], rows["error"], strict=True))
    assert (errors["Weights"], errors["KV cache"], errors["Peak, live"]) == (0, 0, -50)
    worst = summary.set_index("quantity")["worst"]
    assert worst["Peak, live"] == 50
    assert set(rows["record"]) == {one.id}
    assert "CPU" not in captions(app)  # it is not among the devices without a record
    assert "NVIDIA T4" in captions(app)


def test_a_summary_keeps_held_out_and_calibration_apart(store):
    for split, peak in (("held-out", 2), ("calibration", 4)):
        records.append(store, on_h200(split=split, peak_allocated_bytes=peak * GIB, batch=peak))
    table = tables(opened("measured"))["errors"].set_index(["quantity", "split"])
    for split in ("held-out", "calibration"):
        assert table.loc[("Peak, allocated", split), "n"] == 1
        assert table.loc[("Weights", split), "worst"] == 0
    assert table.loc[("Peak, allocated", "held-out"), "mean error"] < 0


def test_errors_are_summed_up_by_model_when_asked(store):
    records.append(store, on_h200())
    records.append(store, on_h200(model="other"))
    app = opened("measured")
    app.get_by_key("by").set_value("model").run()
    assert not app.exception
    assert set(tables(app)["errors"]["model"]) == {"tiny", "other"}


def test_the_page_opens_on_the_gpu_with_the_most_rows(store):
    records.append(store, made())
    records.append(store, on_h200())
    app = opened("measured")
    assert app.get_by_key("device").value == "h200"
    assert set(tables(app)["rows"]["device"]) == {"h200"}
    app.get_by_key("device").select("all devices").run()
    assert set(tables(app)["rows"]["device"]) == {"h200", "cpu"}


def test_filters_narrow_the_rows(store):
    records.append(store, made())
    records.append(store, made(model="other", phase="prefill", output_tokens=1))
    app = opened("measured")
    assert set(tables(app)["rows"]["model"]) == {"tiny", "other"}
    app.get_by_key("of_model").select("other").run()
    assert set(tables(app)["rows"]["model"]) == {"other"}
    app.get_by_key("in_phase").select("generation").run()
    assert not app.exception


@pytest.mark.parametrize(
    ("key", "chosen", "column", "left"),
    [
        ("of_suite", "training", "suite", {"training"}),
        ("of_split", "calibration", "split", {"calibration"}),
        ("of_split", "outside the suites", "record", None),
        ("of_quantity", "Weights", "quantity", {"Weights"}),
        ("in_runtime", "attnlab", "runtime", {"attnlab"}),
    ],
)
def test_each_filter_leaves_what_it_says(store, key, chosen, column, left):
    unsplit = on_h200(suite=None, split=None, batch=3)
    records.append(store, on_h200())
    records.append(store, on_h200(suite="training", split="calibration", batch=4))
    records.append(store, unsplit)
    app = opened("measured")
    app.get_by_key(key).select(chosen).run()
    assert not app.exception
    assert set(tables(app)["rows"][column]) == (left or {unsplit.id})


def test_filters_that_leave_nothing_say_so(store):
    records.append(store, on_h200())
    records.append(store, on_h200(suite="training", split="calibration", batch=4))
    app = opened("measured")
    app.get_by_key("of_suite").select("inference")
    app.get_by_key("of_split").select("calibration").run()
    assert app.info[0].value == "The filters leave no measurement."


def test_repeated_runs_are_shown_before_the_errors_and_their_absence_said(store):
    records.append(store, on_h200())
    app = opened("measured")
    assert "No point here was measured by two runs yet." in captions(app)
    records.append(store, on_h200(suite="allocator", peak_allocated_bytes=GIB))
    app.run()
    assert "No point here" not in captions(app)
    table = tables(app)["repeatability"].set_index(["between", "quantity"])
    assert table.loc[("runs", "Weights"), "worst spread"] == 0
    assert table.loc[("runs", "Peak, allocated"), "worst spread"] > 100
    assert list(tables(app)) == ["repeatability", "errors", "run", "others", "rows"]


def test_a_run_is_opened_with_its_components_and_its_series(store):
    plain = on_h200()
    kept = on_h200(batch=4, series=series().to_json_dict())
    for record in (plain, kept):
        records.append(store, record)
    app = opened("measured")
    assert app.get_by_key("run").value == kept.id  # those with a series first
    parts = tables(app)["run"].set_index("component")
    assert parts.loc["Weights", "error"] == 0
    drawn = next(f for f in figures(app) if any(t.get("name") == "used, NVML" for t in f["data"]))
    levels = {s["name"]: s["y0"] for s in drawn["layout"]["shapes"] if "begins" not in s["name"]}
    memory = estimate_of(kept).memory
    assert levels["weights"] == pytest.approx(memory.weights_bytes / GIB)
    assert levels["device used"] == pytest.approx(memory.device_used_bytes / GIB)
    names = [a["text"] for a in drawn["layout"]["annotations"]]
    assert names[:2] == ["load", "prefill"]
    app.get_by_key("near_peak").set_value(True).run()
    assert not app.exception
    app.get_by_key("run").select(plain.id).run()
    assert "No time series" in captions(app)
    assert app.query_params["run"] == plain.id


def test_a_link_opens_its_run(store):
    first, second = on_h200(), on_h200(batch=4)
    for record in (first, second):
        records.append(store, record)
    app = opened("measured")
    assert app.get_by_key("run").value == first.id
    linked = opened("measured", run=second.id)
    assert linked.get_by_key("run").value == second.id
    assert opened("measured", run="nonsense").get_by_key("run").value == first.id


@pytest.mark.parametrize("series", [{"schema": 99}, {}, {"time_s": "soon"}])
def test_a_series_that_cannot_be_read_is_one_line(store, series):
    records.append(store, on_h200(series=series))
    app = opened("measured")
    assert len(app.warning) == 1
    assert "run" in tables(app)


def test_a_record_of_peaks_alone_is_shown_with_what_is_there(store):
    """Of the suite allocator: no live tensors, nothing of the driver, no times."""
    one = measured(suite="allocator", split="held-out", peak_allocated_bytes=GIB)
    records.append(store, one)
    app = opened("measured")
    assert list(tables(app)["run"]["component"]) == ["Peak, allocated"]
    assert not app.exception


def test_a_record_that_the_planner_refuses_is_listed_without_a_figure(store):
    records.append(store, measured(config={"model_type": "llama4"}, weights_bytes=GIB))
    app = opened("measured")
    assert len(app.warning) == 1
    assert list(tables(app)["rows"]["predicted"]) == ["—"]
    assert not app.exception


def test_the_page_begins_with_the_errors_of_what_was_held_out(store):
    records.append(store, on_h200())
    records.append(store, on_h200(split="calibration", ttft_s=(50.0,)))
    app = opened("measured")
    times = [row for row in measurements.store().rows if row.quantity == "ttft_s"]
    (held_out,) = [row for row in times if row.split == "held-out"]
    cards = {card.label: card.value for card in app.metric}
    assert cards["TTFT"] == f"{100 * abs(held_out.relative_error):.1f} %"
    assert cards["Peak, reserved"] == "0 %"


def test_a_run_that_a_link_shows_comes_before_the_errors_of_all(store):
    records.append(store, on_h200())
    name = next(iter(measurements.loaded()))
    order = [heading.value for heading in opened("measured", run=name, show="run").subheader]
    assert order[:2] == ["One run", "How far off"]


def test_other_methods_stand_beside_ours(store):
    records.append(store, on_h200())
    table = tables(opened("measured"))["others"].set_index(["quantity", "method"])
    assert table.loc[("Peak, allocated", "weights-only"), "our mean"] == 0
    assert table.loc[("Peak, allocated", "weights-only"), "mean"] > 0
    assert ("TTFT", "naive-roofline") in table.index


def test_what_other_tools_print_stands_beside_ours_where_their_gpu_is_shown(store):
    records.append(store, on_h200())
    sizes = [f for f in opened("measured").dataframe if "batch × prompt" in f.value]
    assert len(sizes) == 2
    for frame in sizes:
        assert {"ours", "GenZ", "aiconfigurator-vllm"} <= set(frame.value)
        assert next(iter(frame.value["batch × prompt"])) == "1 × 128"
    assert min(sizes[1].value["ours"]) > 3.13  # ms: the floor of a token's time


def test_training_steps_are_in_the_figures(store):
    step = {"optimizer": "adamw", "checkpointing": "none"}
    one = measured(phase="training", step=step, output_tokens=1, step_s=(0.1,), gradients_bytes=GIB)
    rows = {row.quantity for row in compare([one])}
    assert rows == {"gradients_bytes", "step_s"}
    records.append(store, one)
    app = opened("measured")
    names = {trace.get("name") for figure in figures(app) for trace in figure["data"]}
    assert {"Gradients", "Step"} <= names


def test_traces_stand_beside_predictions_when_asked(store):
    records.append(store, made(attention="naive"))
    app = opened("measured")
    assert set(tables(app)["rows"]["traced"]) == {"—"}
    app.get_by_key("traced").set_value(True).run()
    table = tables(app)["rows"].set_index("quantity")
    assert not app.exception
    assert table.loc["Weights", "traced"] == table.loc["Weights", "predicted"]
    assert table.loc["Peak, live", "traced"] == table.loc["Peak, live", "predicted"]


def test_a_torn_last_line_is_reported_and_the_rest_shown(store):
    records.append(store, made())
    store.write_bytes(store.read_bytes() + b'{"schema": 1, "id')
    app = opened("measured")
    assert len(app.warning) == 1
    assert "a torn last line" in app.warning[0].value
    assert "rows" in tables(app)


def test_records_of_a_newer_version_are_refused_in_words_on_both_pages(store):
    records.append(store, made())
    written = store.read_text().replace(f'"schema": {records.SCHEMA}', '"schema": 99')
    store.write_text(written)
    app = opened("measured")
    assert "schema=99" in app.error[0].value
    assert "schema=99" in captions(opened(runtime="vllm"))


def test_a_record_that_ran_out_of_memory_is_no_measurement(store):
    records.append(store, made(status="oom"))
    app = opened("measured")
    assert "oom" in app.warning[0].value
    assert app.info[0].value == "No measurements yet."


def test_many_problems_are_one_line_that_opens(store):
    for _ in range(3):
        records.append(store, made(status="oom"))
    records.append(store, made())
    app = opened("measured")
    assert not app.warning
    labels = [expander.label for expander in app.expander]
    assert "3 records or lines are not compared" in labels
    assert app.code[0].value.count("oom") == 3


def test_a_device_without_records_is_said_by_name(store):
    records.append(store, made())
    app = opened("measured")
    app.get_by_key("device").select("h200").run()
    assert app.info[0].value == "No measurements for NVIDIA H200 SXM yet."
    assert app.code[0].value.endswith("--device cuda")


@pytest.mark.parametrize("make", [made, on_h200])
def test_a_new_record_is_seen_without_a_restart(store, make):
    app = opened("measured")
    records.append(store, make())
    app.run()
    assert not app.exception
    assert "rows" in tables(app)
