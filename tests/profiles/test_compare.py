"""Prediction beside measurement: which rows there are, and what the errors of them are."""

import dataclasses

import pytest

import planner
from profiles import records
from profiles.compare import QUANTITIES, Row, compare, estimate_of, summary, to_frame
from profiles.measurement import record_of
from profiles.points import TrainingPoint
from tests.profiles.made import CONFIG, ENVIRONMENT, measured


def row(*, quantity="ttft_s", error=0.1, split=None, predicted=1.0, **more):
    values = {
        "device": "h200",
        "suite": None,
        "split": split,
        "model": "tiny",
        "phase": "prefill",
        "quantity": quantity,
        "predicted": predicted,
        "measured": 1.0,
        "relative_error": error,
        "record": "r",
    }
    return Row(**(values | more))


def test_a_row_has_the_fields_of_the_contract():
    names = "device suite split model phase quantity predicted measured relative_error record"
    assert " ".join(f.name for f in dataclasses.fields(Row)) == f"{names} traced"


def test_a_measured_step_is_predicted_by_the_usual_routing():
    """What routers pick is not set, and no field of the record."""
    work = planner.Training(batch=1, sequence_tokens=16, optimizer="sgd")
    record = record_of(
        planner.read_config(CONFIG),
        TrainingPoint(work=work),
        runtime="transformers",
        attention="sdpa",
        dtype="bf16",
        status="ok",
        seen={},
        env=ENVIRONMENT,
    )
    assert "routing" not in record.step
    assert estimate_of(record).work == work


def test_the_error_is_signed_and_relative_to_the_measurement():
    exact = estimate_of(measured()).memory.weights_bytes
    assert exact > 0
    one = measured(weights_bytes=exact * 2, suite="inference", split="held-out")
    (only,) = compare([one])
    assert (only.quantity, only.predicted, only.measured) == ("weights_bytes", exact, exact * 2)
    assert only.relative_error == -0.5
    assert (only.device, only.suite, only.split) == ("h200", "inference", "held-out")
    assert (only.model, only.phase, only.record) == ("tiny", "generation", one.id)


def test_the_prediction_is_of_the_records_own_work():
    one = measured(batch=3, prompt_tokens=10, output_tokens=4, kv_cache_bytes=1, runtime="attnlab")
    (only,) = compare([one])
    expected = planner.kv_cache_bytes(
        planner.read_config(CONFIG), batch=3, context_tokens=13, dtype="bf16", runtime="attnlab"
    )
    assert only.predicted == expected == 2 * 2 * 2 * 16 * 2 * 3 * 13


def test_logits_attention_and_dtype_of_the_record_change_the_prediction():
    last, full = measured(peak_live_bytes=1), measured(peak_live_bytes=1, logits="all")
    wide = measured(peak_live_bytes=1, dtype="fp32", kv_dtype="fp32")
    naive = measured(peak_live_bytes=1, attention="naive", prompt_tokens=400)
    fused = measured(peak_live_bytes=1, attention="sdpa:flash", prompt_tokens=400)
    peaks = [r.predicted for r in compare([last, full, wide, naive, fused])]
    assert peaks[1] > peaks[0]
    assert peaks[2] > peaks[0]
    assert peaks[3] > peaks[4]


def test_only_what_was_measured_has_rows():
    assert compare([measured()]) == []
    one = measured(weights_bytes=1, kv_cache_bytes=1, ttft_s=(0.1,), step_s=(0.2, 0.3, 0.4))
    assert [r.quantity for r in compare([one])] == [
        "weights_bytes",
        "kv_cache_bytes",
        "ttft_s",
        "tpot_s",
    ]


def test_a_prefill_is_a_ttft_and_a_decode_a_step():
    prefill = measured(phase="prefill", output_tokens=1, step_s=(1.0, 2.0, 9.0))
    decode = measured(phase="decode", step_s=(0.1, 0.2, 0.9))
    rows = compare([prefill, decode])
    assert [(r.quantity, r.measured) for r in rows] == [("ttft_s", 2.0), ("step_s", 0.2)]
    assert rows[1].predicted == estimate_of(decode).latency.tpot_s


def test_device_used_leaves_out_what_others_held_before():
    one = measured(device_used_before_bytes=100, device_used_peak_bytes=2**30 + 100)
    (only,) = compare([one])
    assert (only.quantity, only.measured) == ("device_used_bytes", 2**30)


def test_a_record_that_the_planner_refuses_keeps_its_rows_and_is_reported():
    unknown = measured(config={"model_type": "llama4"}, weights_bytes=5)
    homeless = measured(
        environment=dataclasses.replace(ENVIRONMENT, gpu=None, device_name="GT 210"),
        weights_bytes=5,
    )
    problems = []
    rows = compare([unknown, homeless], on_problem=problems.append)
    assert [(r.predicted, r.measured, r.relative_error) for r in rows] == [(None, 5, None)] * 2
    assert rows[1].device == "GT 210"
    assert unknown.id in problems[0]
    assert "llama4" in problems[0]
    assert "GT 210" in problems[1]


def test_a_record_that_did_not_end_well_is_reported():
    problems = []
    assert compare([measured(status="oom", weights_bytes=5)], on_problem=problems.append) == []
    assert problems[0].endswith("oom")


def test_summary_counts_absolute_errors_by_quantity_and_split():
    errors = [0.1, -0.2, 0.3, -0.4, 0.0]
    rows = [row(error=e, split="held-out") for e in errors]
    rows += [row(quantity="weights_bytes", error=0.0), row(error=None, predicted=None)]
    weights, unsplit, held_out = summary(rows)
    assert (weights.quantity, weights.n, weights.worst_abs_error) == ("weights_bytes", 1, 0.0)
    assert (unsplit.split, unsplit.n, unsplit.unpredicted) == (None, 0, 1)
    assert unsplit.mean_abs_error is None
    assert held_out.n == 5
    assert held_out.mean_abs_error == pytest.approx(0.2)
    assert held_out.p90_abs_error == pytest.approx(0.36)  # numpy.percentile, linear
    assert held_out.worst_abs_error == 0.4


def test_summary_of_nothing_is_empty():
    assert summary([]) == []


def test_a_summary_has_the_bias_with_its_sign_and_the_worst_record():
    rows = [row(error=0.1, record="a"), row(error=-0.4, record="b"), row(error=0.0, record="c")]
    (only,) = summary(rows)
    assert only.mean_error == pytest.approx(-0.1)
    assert (only.worst_record, only.by, only.group) == ("b", None, None)
    assert summary([row(error=0.0)])[0].worst_record is None


@pytest.mark.parametrize("by", ["suite", "model", "phase", "device"])
def test_a_summary_by_groups_keeps_splits_and_quantities_apart(by):
    rows = [
        row(error=0.1, split="held-out", **{by: "one"}),
        row(error=0.3, split="calibration", **{by: "one"}),
        row(error=0.2, split="held-out", **{by: "two"}),
        row(error=0.0, split="held-out", quantity="weights_bytes", **{by: "two"}),
    ]
    found = [(s.group, s.quantity, s.split, s.worst_abs_error) for s in summary(rows, by=by)]
    assert found == [
        ("one", "ttft_s", "calibration", 0.3),
        ("one", "ttft_s", "held-out", 0.1),
        ("two", "weights_bytes", "held-out", 0.0),
        ("two", "ttft_s", "held-out", 0.2),
    ]
    assert {s.by for s in summary(rows, by=by)} == {by}


def test_a_summary_by_something_else_is_refused():
    with pytest.raises(planner.ConfigError, match="by='weather'"):
        summary([row()], by="weather")


def test_a_training_step_is_held_against_the_time_of_a_step():
    step = {"optimizer": "adamw", "checkpointing": "none"}
    one = measured(
        phase="training", step=step, output_tokens=1, step_s=(0.1, 0.2, 0.3), gradients_bytes=1
    )
    rows = {r.quantity: r for r in compare([one])}
    assert rows["step_s"].measured == 0.2
    assert rows["step_s"].predicted == estimate_of(one).latency.step_s
    assert rows["gradients_bytes"].predicted == estimate_of(one).memory.gradients_bytes


def test_a_record_of_peaks_alone_has_rows_for_them_alone():
    """What is read off an allocator's history: no live tensors, nothing of the driver, no times."""
    one = measured(suite="allocator", peak_allocated_bytes=2**30, peak_reserved_bytes=2**30)
    assert [r.quantity for r in compare([one])] == ["peak_allocated_bytes", "peak_reserved_bytes"]


def test_a_frame_has_a_column_for_each_field_even_when_empty():
    names = [f.name for f in dataclasses.fields(Row)]
    assert list(to_frame([]).columns) == names
    frame = to_frame([row(), row(quantity="tpot_s")])
    assert list(frame.columns) == names
    assert frame["quantity"].tolist() == ["ttft_s", "tpot_s"]


def test_every_quantity_that_a_record_can_have_is_known():
    everything = measured(
        **{name: 1 for name in QUANTITIES if name in records.Record.__dataclass_fields__}
        | {"ttft_s": (1.0,), "step_s": (1.0, 1.0, 1.0), "device_used_peak_bytes": 1}
    )
    assert {r.quantity for r in compare([everything])} <= set(QUANTITIES)
