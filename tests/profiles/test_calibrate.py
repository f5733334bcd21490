"""Fitting: what made-up devices follow is found again; nothing held out is seen."""

import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import planner
from planner import ConfigError
from planner.cli.commands import main
from planner.timing import clock
from planner.timing.byte_times import byte_seconds
from planner.timing.calibration import from_dict
from planner.timing.calibration import load as load_calibration
from planner.timing.op_families import DECODE, GEMM
from planner.timing.op_times import Roof
from profiles import records as whole_records
from profiles.calibrate import calibration, write
from profiles.compare import compare
from profiles.fitting import Samples, errors, fit_family, levenberg_marquardt, spread
from profiles.host_costs import host_scale
from profiles.microbench import attention_points, gemm_points
from profiles.microbench.op_record import load
from profiles.microbench.run import run
from profiles.op_samples import samples_of_records
from profiles.op_tables import held_out, package_folder

RECORDS = Path(__file__).parents[2] / "profiles" / "data" / "microbench" / "h200.jsonl"
CPU_RECORDS = RECORDS.with_name("cpu.jsonl")
PEAK, BANDWIDTH = 1e15, 4e12
WORST = {
    "across": 0.12,
    "bmm:fp32": 0.32,
    "convolution": 0.02,
    "cumsum": 0.25,
    "cumsum down": 0.05,
    "far": 0.09,
    "joined": 0.06,
    "offsets": 0.1,
    "offsets cast": 0.07,
    "attention_backward:bf16:masked": 0.1,
    "elementwise:tanh": 0.14,
    "prefill:bf16:efficient": 0.08,
}
"""Bounds on the 90th percentile of errors over ops whose shapes no fit saw: of scans Bamba-9B's."""
TRUE = Roof(floor_s=3e-6, compute=0.7, bandwidth=0.8, extra_flops=1e8, extra_bytes=2e6, power=3.0)


def made(noise=0.0, bump=0.0):
    """Products of a made-up device, a quarter of the shapes held out."""
    rng = np.random.default_rng(0)
    shapes = [(n, k) for n in (512, 1024, 2048, 4096, 8192) for k in (512, 1024, 4096, 8192)]
    rows = [(m, n, k) for n, k in shapes for m in (1, 2, 8, 32, 128, 512, 2048, 8192)]
    sizes = np.array(rows, dtype=float)
    flops, moved = GEMM.work(*sizes.T, "bf16")
    seconds = TRUE.seconds(flops, moved, PEAK, BANDWIDTH)
    seconds = seconds * np.exp(bump * np.sin(np.log2(sizes[:, 0])))
    seconds = seconds * np.exp(noise * rng.standard_normal(len(rows)))
    marks = [shapes.index((n, k)) % 4 == 0 for _, n, k in rows]
    return Samples(sizes=sizes, seconds=seconds, held_out=np.array(marks))


def fitted(samples, points=200):
    return fit_family(
        GEMM, "bf16", samples, peak=PEAK, bandwidth=BANDWIDTH, source="made", points=points
    )


def test_a_roofline_is_found_again():
    fit = fitted(made())
    assert fit.roof.compute == pytest.approx(0.7, rel=0.05)
    assert fit.roof.bandwidth == pytest.approx(0.8, rel=0.1)
    assert fit.held_out.median < 0.01


def test_what_a_roofline_cannot_follow_goes_into_the_residual():
    samples = made(bump=0.2)
    fit = fitted(samples)
    flat = replace(fit, weights=np.zeros_like(fit.weights))
    assert fit.held_out.median < 0.03
    assert errors(flat, samples.of(samples.held_out)).median > 0.05


def test_held_out_rows_are_not_seen():
    samples = made()
    spoilt = replace(samples, seconds=np.where(samples.held_out, 1.0, samples.seconds))
    assert np.array_equal(fitted(samples).weights, fitted(spoilt).weights)
    assert fitted(samples).roof == fitted(spoilt).roof


def test_points_are_spread_and_not_repeated():
    places = np.random.default_rng(1).random((500, 3))
    chosen = spread(places, 40)
    assert len(set(chosen.tolist())) == 40
    gaps = np.linalg.norm(places[chosen][:, None] - places[chosen][None], axis=-1)
    assert np.min(gaps + 9 * np.eye(40)) > 0.15


def test_the_split_is_by_shape_in_tables_and_in_records():
    assert held_out(4096, 4096) == held_out(4096, 4096)
    assert 0.15 < np.mean([held_out(n, k) for n in range(64) for k in range(64)]) < 0.35
    for record in load(RECORDS).ops:
        shape = record.shape
        if record.family == "gemm" and not record.op.startswith("bmm"):
            assert record.split == gemm_points.split_of(shape["n"], shape["k"])
        elif record.family in ("prefill", "decode") and "kv_heads" in shape:
            heads = (shape["heads"], shape["kv_heads"], shape["head_dim"])
            assert record.split == attention_points.split_of(heads)


def test_what_no_fit_takes_yet_changes_none():
    """Half precision, biases and few products of pairs were timed beside what is fitted."""
    measured = load(RECORDS)
    product = next(r for r in measured.ops if (r.family, r.op) == ("gemm", "linear"))
    slow = (1.0,)
    beside = (
        replace(product, dtype="fp16", split="held-out", samples_s=slow),
        replace(product, op="linear_bias", samples_s=slow),
        replace(product, op="bmm", shape={"batch": 2, **product.shape}, samples_s=slow),
    )
    contents = [
        calibration("h200", records=replace(measured, ops=ops))
        for ops in (measured.ops, (*measured.ops, *beside))
    ]
    for content in contents:
        content.pop("sources")
    assert contents[0] == contents[1]


def test_no_shape_is_on_both_sides_of_the_split():
    samples = samples_of_records(load(RECORDS).ops)
    for name, columns in (("gemm:bf16", slice(1, 3)), ("decode:bf16:flash", slice(2, 5))):
        found = samples[name]
        seen = {tuple(row) for row in found.sizes[~found.held_out][:, columns]}
        kept = {tuple(row) for row in found.sizes[found.held_out][:, columns]}
        assert seen
        assert kept
        assert not seen & kept


def test_records_of_an_h200_are_fitted_as_committed():
    """136 products fitted: (n, k) never seen are 3.4 % off in the median."""
    content = calibration("h200", records=load(RECORDS))
    fits = from_dict(content).fits
    assert fits["gemm:bf16"].held_out.median < 0.045
    assert fits["gemm:bf16"].held_out.p90 < 0.12
    assert fits["prefill:bf16:cudnn"].held_out.median < 0.04
    for name, bound in WORST.items():
        assert fits[name].held_out.p90 <= bound, name
    assert fits["bmm:fp32"].held_out.median < 0.06  # the worst are of 3 and 4 rows
    products = [r for r in load(RECORDS).ops if (r.family, r.op) == ("gemm", "linear")]
    timed_s = {(r.dtype, *r.shape.values()): r.median_s for r in products}
    large = [sizes for dtype, *sizes in timed_s if dtype == "fp16" and sizes[0] >= 2048]
    longer = [timed_s["fp16", *sizes] / timed_s["bf16", *sizes] for sizes in large]
    assert content["half"] == pytest.approx(statistics.median(longer), abs=0.005)
    assert content["graph"]["kernel_s"] == pytest.approx(0.92e-6, rel=0.01)
    assert content["energy"]["idle_w"] == pytest.approx(163.7, abs=0.1)
    assert content["energy"]["clock"] == pytest.approx(1.374 / 1.6205, abs=0.001)


def test_one_number_a_kernel_from_two_named_rows_times_the_steps_that_a_graph_replayed():
    """Half a microsecond; what it does for steps that nothing was taken from."""
    graph = load_calibration("h200").graph
    records, _ = whole_records.load([whole_records.DATA / "h200.jsonl"])
    replayed = [r for r in records if r.mode == "graph" and r.status == "ok"]
    own = [r for r in replayed if r.runtime == "attnlab"]
    named = [str(r.point) for r in own if r.split == "calibration"]
    assert sorted(named) == list(graph.scaled_on)
    assert len(named) == 2
    rows = compare(r for r in replayed if r.split == "held-out")
    off = [abs(row.relative_error) for row in rows if row.quantity == "replay_s"]
    assert len(off) == 21
    assert statistics.fmean(off) < 0.04
    assert max(off) < 0.15


def test_kinds_timed_among_others_are_what_the_others_leave():
    """A mean of 8 rows takes most of a norm's 16 µs; one that streams is no slower than a sum."""
    ops = load(RECORDS).ops
    fits = from_dict(calibration("h200", records=load(RECORDS))).fits
    norm = next(r for r in ops if r.op == "rmsnorm" and r.shape.get("rows") == 8)
    few_s = float(fits["mean"].seconds((4.0 * 8 * 4096,)))
    assert 0.25 * norm.median_s < few_s < 0.5 * norm.median_s
    whole = next(r for r in ops if (r.family, r.op) == ("ceiling", "sum"))
    assert float(fits["mean"].seconds((float(whole.bytes),))) == pytest.approx(
        whole.median_s, rel=0.02
    )
    softmax = next(r for r in ops if r.op == "softmax" and r.shape["rows"] == 32768)
    eight, all_bytes = 8, 6 + 8 + 6  # of an element: in softmax; with the casts before and after
    alone_s = float(fits["softmax"].seconds((8.0 * 32768 * 4096,)))
    assert 0.9 * eight / all_bytes < alone_s / softmax.median_s < 1.1 * eight / all_bytes + 0.05


MIXED = ("mul_mixed", "mul_heads")


def test_products_of_mixed_dtypes_are_a_kind_of_their_own_once_they_are_timed():
    """Until then they take what strides and conversions add to a plain product."""
    measured = load(RECORDS)
    measured = replace(measured, ops=tuple(r for r in measured.ops if r.op not in MIXED))
    like = next(r for r in measured.ops if (r.family, r.op) == ("bandwidth", "add"))
    slow = {rows: 2e-6 + 1e-11 * rows * 2048 for rows in (64, 1024, 4096, 32768)}
    timed = [
        replace(like, op="mul_mixed", shape={"rows": rows, "width": 2048}, samples_s=(taken,))
        for rows, taken in slow.items()
    ]
    h200 = planner.gpu_named("h200")
    moved, count = 6.0 * 4096 * 2048, 4096.0 * 2048
    seconds = []
    for ops in (measured.ops, (*measured.ops, *timed)):
        known = from_dict(calibration("h200", records=replace(measured, ops=ops)))
        speed = clock.Speed(gpu=h200, dtype="bf16", calibration=known)
        kinds = ("strided cast", "strided", "cast", "elementwise")
        seconds.append([byte_seconds(kind, moved, count, speed) for kind in kinds])
    before, after = seconds
    assert before[0] == pytest.approx(before[1] + before[2] - before[3])
    assert after[0] == pytest.approx(slow[4096], rel=0.05)
    assert after[0] > 1.5 * before[0]
    assert after[1:] == before[1:]


def test_a_usual_host_is_the_median_of_what_calibration_rows_had():
    end_to_end, _ = whole_records.load([whole_records.DATA / "h200.jsonl"])
    content = calibration("h200", records=load(RECORDS), end_to_end=end_to_end)
    issued = [r for r in end_to_end if r.split == "calibration" and r.mode == "eager"]
    beside = [r for r in issued if r.host_add_s]
    timed = next(r.median_s for r in load(RECORDS).ops if (r.family, r.op) == ("host", "add"))
    adds = sorted([timed, *(statistics.median(r.host_add_s) for r in beside)])
    assert len(adds) > len(beside) > 3
    assert content["host"]["op_s"]["add"] == pytest.approx(statistics.median(adds), rel=1e-3)


def test_a_written_file_is_read_back(tmp_path):
    content = calibration("h200", records=load(RECORDS))
    assert write(content, tmp_path / "h200.json") < 200_000
    again = from_dict(json.loads((tmp_path / "h200.json").read_text()))
    assert again.fits.keys() == from_dict(content).fits.keys()
    sizes = (16.0, 4096.0, 4096.0)
    assert again.fits["gemm:bf16"].seconds(sizes) == pytest.approx(
        from_dict(content).fits["gemm:bf16"].seconds(sizes)
    )


def test_the_hosts_factor_is_that_of_the_rows_which_wait_for_it():
    waits, hidden = (0.040, 0.008, 0.020), (0.030, 0.028, 0.020)
    assert host_scale([waits]) == pytest.approx(2.0)
    assert host_scale([waits, hidden, (0.066, 0.008, 0.020), waits]) == pytest.approx(2.0)
    assert host_scale([hidden]) is None


def test_a_minimum_is_found():
    x = levenberg_marquardt(lambda x: np.array([x[0] - 0.5, 3 * (x[1] + 0.2)]), np.zeros(2))
    assert x == pytest.approx([0.5, -0.2], abs=0.01)


def test_residuals_of_attention_depend_on_five_sizes():
    assert DECODE.sizes == ("B", "S", "H", "G", "D")
    assert len(DECODE.scales) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "t4"], "t4"),
        (["--gpu", "h200", "--from", "guesses"], "--from='guesses' is not allowed"),
        (["--gpu", "h200", "--from", "aiconfigurator", "--tables", "/nowhere"], "no systems/data"),
        (["--gpu", "h200", "--from", "aiconfigurator", "--budget", "9s"], "not allowed with"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_a_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_tables_that_are_not_installed_say_how_to_get_them(tmp_path):
    with pytest.raises(ConfigError, match="has no systems/data"):
        package_folder(tmp_path)


def test_the_shell_writes_a_calibration(tmp_path, capsys):
    out = tmp_path / "h200.json"
    with pytest.raises(SystemExit) as ended:
        main(["calibrate", "--gpu", "h200", "--out", str(out), "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["written"] == str(out)
    assert {"fit", "rows", "points", "held_out", "median_error", "p90_error"} == set(
        told["fits"][0]
    )
    assert from_dict(json.loads(out.read_text())).host.scale["transformers"] > 1


@pytest.fixture(scope="module")
def this_cpu(tmp_path_factory):
    """A few seconds of products and streams of bytes, timed here."""
    out = tmp_path_factory.mktemp("cpu") / "cpu.jsonl"
    run("cpu", budget_s=6, out=out, families=["gemm", "bandwidth", "prefill", "decode"])
    return from_dict(calibration("cpu", records=load(out)))


def test_this_cpu_is_calibrated_from_its_own_ops(this_cpu):
    fit = this_cpu.fit("gemm", "fp32")
    small, large = (fit.seconds((float(m), 512.0, 512.0)) for m in (1, 512))
    assert 1e-7 < small < large < 1.0
    # a tenth above the best that was seen: nothing is predicted to be faster
    assert fit.peak_flops_per_s >= (1 - 1e-9) * 2 * 512**3 / large


def test_a_calibrated_cpu_times_a_model_by_what_was_measured(this_cpu, monkeypatch):
    monkeypatch.setattr(clock, "calibration_of", lambda gpu: this_cpu)
    model = planner.load_model("llama-50m")
    work = planner.Inference(batch=1, prompt_tokens=61, output_tokens=5, logits="last")
    deploy = planner.Deployment(gpu="cpu", runtime="attnlab", dtype="fp32", mode="eager")
    latency = planner.estimate(model, work, deploy).latency
    assert latency.basis == f"ops measured on {this_cpu.measured_on.in_words}"
    assert 1e-4 < latency.tpot_s < latency.ttft_s < 60
    low, high = latency.tpot_interval_s
    assert low < latency.tpot_s < high


def test_a_cpu_multiplies_three_rows_slower_than_four():
    """Over weights that no fit saw, as they were measured."""
    ops, sizes = load(CPU_RECORDS).ops, {"n": 28672, "k": 640}
    fits = from_dict(calibration("cpu", records=load(CPU_RECORDS))).fits
    seconds, measured = [], []
    for name, rows in (("gemm_few:fp32", 3), ("gemm:fp32", 4)):
        held_out = next(r for r in ops if r.shape == {"m": rows, **sizes})
        seconds.append(float(fits[name].seconds((rows, *sizes.values()))))
        measured.append(held_out.median_s)
        assert held_out.split == "held-out"
    assert measured[0] > 1.5 * measured[1]
    assert seconds[0] > 1.4 * seconds[1]
    assert seconds[0] == pytest.approx(measured[0], rel=0.05)


def test_the_committed_file_of_a_cpu_is_of_the_committed_ops():
    """planner calibrate --gpu cpu --from records --out planner/catalog/calibration/cpu.json."""
    made, committed = calibration("cpu", records=load(CPU_RECORDS)), load_calibration("cpu")
    sizes = (3.0, 640.0, 640.0)
    assert made["sources"]["records"]["what"] == committed.sources["records"].what
    assert from_dict(made).fits.keys() == committed.fits.keys()
    assert from_dict(made).pages == committed.pages
    assert from_dict(made).measured_on == committed.measured_on
    few = from_dict(made).fits["gemm_few:fp32"].seconds(sizes)
    assert few == pytest.approx(committed.fits["gemm_few:fp32"].seconds(sizes), rel=1e-3)
