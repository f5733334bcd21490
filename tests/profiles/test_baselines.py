"""What simpler rules and other tools say of the same rows, worked out by hand."""

import pytest

import planner
from profiles import peers
from profiles.baselines import NAIVE_ROOFLINE, WEIGHTS_ONLY, baseline_summary, baselines
from profiles.compare import compare
from tests.profiles.made import CONFIG, measured

P = planner.read_config(CONFIG).parameter_count
FLOPS_PER_S, BYTES_PER_S = 989.4e12, 4.8e12  # an H200, bf16


def found(*records):
    return baselines(records, compare(records))


def test_weights_only_is_two_bytes_a_parameter_for_every_peak():
    (only,) = found(measured(peak_allocated_bytes=4 * P))
    assert (only.method, only.predicted, only.relative_error) == (WEIGHTS_ONLY, 2 * P, -0.5)
    kinds = {"peak_live_bytes": 1, "peak_reserved_bytes": 1, "device_used_peak_bytes": 1}
    assert {b.predicted for b in found(measured(**kinds))} == {2 * P}
    assert found(measured(weights_bytes=1, kv_cache_bytes=1)) == []


def test_weights_only_has_nothing_to_say_of_training():
    step = {"optimizer": "adamw", "checkpointing": "none"}
    assert found(measured(phase="training", step=step, output_tokens=1, peak_live_bytes=1)) == []


def test_a_naive_prefill_is_two_flops_a_parameter_and_token_or_the_weights_once():
    long = measured(phase="prefill", output_tokens=1, batch=8, prompt_tokens=500, step_s=(1.0,))
    short = measured(phase="prefill", output_tokens=1, batch=1, prompt_tokens=2, step_s=(1.0,))
    computing, moving = (b.predicted for b in found(long, short))
    assert computing == pytest.approx(2 * P * 8 * 500 / FLOPS_PER_S, rel=1e-3)
    assert moving == pytest.approx(2 * P / BYTES_PER_S)


def test_a_naive_decode_step_reads_weights_and_cache():
    (only,) = found(measured(step_s=(0.1, 0.1, 0.1)))
    cache = 2 * 2 * 2 * 16 * 2 * 2 * 19
    assert (only.quantity, only.method) == ("tpot_s", NAIVE_ROOFLINE)
    assert only.predicted == pytest.approx((2 * P + cache) / BYTES_PER_S)


@pytest.mark.parametrize(("checkpointing", "flops"), [("none", 6), ("full", 8)])
def test_a_naive_training_step_is_six_or_eight_flops_a_parameter_and_token(checkpointing, flops):
    step = {"optimizer": "adamw", "checkpointing": checkpointing}
    sizes = {"batch": 16, "prompt_tokens": 500, "output_tokens": 1}
    (only,) = found(measured(phase="training", step=step, step_s=(1.0,), **sizes))
    assert only.predicted == pytest.approx(flops * P * 16 * 500 / FLOPS_PER_S, rel=1e-3)


def test_peers_are_set_against_the_model_the_gpu_and_the_sizes_that_they_were_asked_for():
    config = planner.load_model(peers.MODEL).config
    asked = {"model": peers.MODEL, "config": config, "batch": 8, "prompt_tokens": 1024}
    one = measured(ttft_s=(0.2,), runtime="transformers", attention="sdpa", **asked)
    theirs = {b.method: b.predicted for b in found(one)}
    assert theirs["aiconfigurator-vllm"] == pytest.approx(0.176018)
    assert theirs["GenZ"] == pytest.approx(0.137474)
    assert len(theirs) == 7
    other = measured(ttft_s=(0.2,), runtime="transformers", **(asked | {"batch": 9}))
    assert {b.method for b in found(other)} == {NAIVE_ROOFLINE}


def test_the_peers_table_has_every_size_of_every_peer():
    figures = peers.figures_s()
    assert len(figures) == 8 * 2
    assert {len(by_peer) for by_peer in figures.values()} == {6}


def test_a_summary_has_our_error_on_the_same_rows():
    one, other = measured(peak_live_bytes=2 * P), measured(peak_live_bytes=4 * P)
    (only,) = baseline_summary(found(one, other))
    ours = [abs(row.relative_error) for row in compare([one, other])]
    assert (only.n, only.mean_abs_error, only.worst_abs_error) == (2, 0.25, 0.5)
    assert only.planner_mean_abs_error == pytest.approx(sum(ours) / 2)
    assert only.planner_worst_abs_error == max(ours)


def test_splits_are_kept_apart():
    records = [measured(peak_live_bytes=P, split=s) for s in ("held-out", "calibration")]
    assert [s.split for s in baseline_summary(found(*records))] == ["calibration", "held-out"]


def test_a_row_that_we_do_not_predict_has_no_baseline():
    assert found(measured(config={"model_type": "llama4"}, peak_live_bytes=1)) == []


def test_every_size_that_the_peers_were_asked_for_has_our_time_beside_theirs():
    rows = peers.peer_rows([])
    assert len(rows) == len(peers.figures_s())
    assert [row.quantity for row in rows] == sorted((r.quantity for r in rows), reverse=True)
    for row in rows:
        assert row.measured_s == {}
        assert 0.5 < row.planner_s / row.peers_s["aiconfigurator-vllm"] < 1.5


def test_what_was_measured_stands_beside_the_peers_by_runtime():
    config = planner.load_model(peers.MODEL).config
    asked = {"model": peers.MODEL, "config": config, "batch": 8, "prompt_tokens": 1024}
    records = [
        measured(ttft_s=(0.2,), runtime="transformers", attention="sdpa", **asked),
        measured(ttft_s=(0.3,), runtime="transformers", attention="sdpa", **asked),
        measured(ttft_s=(9.0,)),
    ]
    found = {(r.batch, r.prompt_tokens, r.quantity): r for r in peers.peer_rows(records)}
    mode = records[0].mode
    assert found[8, 1024, "ttft_s"].measured_s == {f"transformers, {mode}": pytest.approx(0.25)}
    assert found[8, 4096, "ttft_s"].measured_s == {}
