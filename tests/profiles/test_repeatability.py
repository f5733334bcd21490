"""How far repeated measurements are apart, and what counts as repeated."""

import dataclasses

import pytest

from profiles.repeatability import repeatability, repeats
from tests.profiles.made import ENVIRONMENT, measured


def runs(*records):
    return [r for r in repeats(records) if r.between == "runs"]


def test_the_spread_of_two_runs_is_their_distance_over_the_median():
    first, second = measured(peak_allocated_bytes=90), measured(peak_allocated_bytes=110)
    (only,) = runs(first, second)
    assert (only.quantity, only.n, only.median) == ("peak_allocated_bytes", 2, 100)
    assert only.spread == pytest.approx(0.2)
    assert only.records == (first.id, second.id)


def test_one_point_in_two_suites_is_a_repetition():
    one = measured(suite="training", split="calibration", peak_reserved_bytes=100)
    (only,) = runs(one, measured(suite="allocator", split="held-out", peak_reserved_bytes=100))
    assert only.spread == 0


def test_a_point_that_is_read_off_a_history_repeats_the_one_that_was_watched():
    """What ran is not in a history, and a later version's step has more fields."""
    point = {"point": "tiny attnlab training 2 × 16", "phase": "training", "output_tokens": 1}
    step = {"optimizer": "adamw", "checkpointing": "none"}
    watched = measured(attention="sdpa:cudnn", step=step, peak_reserved_bytes=1, **point)
    later = step | {"encoder_tokens": None}
    assert len(runs(watched, measured(attention=None, step=later, peak_reserved_bytes=1, **point)))
    other = step | {"dropout": 0.1}
    assert runs(watched, measured(attention=None, step=other, peak_reserved_bytes=1, **point)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"batch": 3},
        {"attention": "naive"},
        {"logits": "all"},
        {"dtype": "fp32"},
        {"runtime_version": "0.2.0"},
        {"config": {"model_type": "llama"}},
        {"environment": dataclasses.replace(ENVIRONMENT, gpu="a100-80gb")},
        {"environment": dataclasses.replace(ENVIRONMENT, torch="2.12.0")},
        {"status": "oom"},
    ],
)
def test_other_work_another_device_and_other_software_are_no_repetition(changes):
    assert runs(measured(weights_bytes=1), measured(weights_bytes=1, **changes)) == []


def test_another_card_of_the_same_kind_is_a_repetition():
    other = dataclasses.replace(ENVIRONMENT, device_uuid="GPU-2")
    assert len(runs(measured(weights_bytes=1), measured(weights_bytes=1, environment=other))) == 1


def test_the_passes_of_one_run_are_compared_among_themselves():
    generation = measured(ttft_s=(1.0, 1.2, 1.1), step_s=(0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3) * 3)
    found = {r.quantity: r for r in repeats([generation])}
    assert found["ttft_s"].spread == pytest.approx(0.2 / 1.1)
    assert found["ttft_s"].between == "passes"
    prefill = measured(phase="prefill", output_tokens=1, step_s=(2.0, 2.0))
    assert [(r.quantity, r.spread) for r in repeats([prefill])] == [("ttft_s", 0.0)]


def test_the_tpot_of_a_pass_is_the_mean_over_its_tokens():
    one = measured(step_s=(0.1, 0.2, 0.3, 0.4, 0.4, 0.4))  # two repeats of three steps
    assert one.repeat_tpot_s == pytest.approx((0.2, 0.4))
    (only,) = repeats([one])
    assert (only.quantity, only.n) == ("tpot_s", 2)
    assert only.spread == pytest.approx(0.2 / 0.3)


def test_what_was_measured_once_has_no_spread():
    assert repeats([measured(weights_bytes=1, ttft_s=(1.0,))]) == []


def test_spreads_are_summed_up_by_device_and_quantity():
    points = [
        measured(peak_allocated_bytes=100),
        measured(peak_allocated_bytes=110),
        measured(peak_allocated_bytes=100, batch=4, ttft_s=(1.0, 1.0)),
        measured(peak_allocated_bytes=100, batch=4),
    ]
    memory, time = repeatability(repeats(points))
    assert (memory.device, memory.quantity, memory.between) == (
        "h200",
        "peak_allocated_bytes",
        "runs",
    )
    assert memory.points == 2
    assert memory.worst_spread == pytest.approx(10 / 105)
    assert memory.mean_spread == pytest.approx(5 / 105)
    assert (time.quantity, time.between, time.points) == ("ttft_s", "passes", 1)
