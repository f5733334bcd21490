"""Whose ops a device is timed by: one's own file, the catalogue's, another CPU's."""

import json
import shutil
from importlib.resources import files

import pytest

import planner
from planner import ConfigError
from planner.catalog.here import Processor, as_on
from planner.timing.calibration import load

LLAMA = planner.load_model("llama-50m")
COMMITTED = files("planner.catalog").joinpath("calibration")
TIMED = load("cpu").measured_on
OTHER = Processor(name="Another CPU", threads=16)


def latency(dtype="fp32", gpu="cpu"):
    work = planner.Inference(batch=1, prompt_tokens=64, output_tokens=4, logits="last")
    deploy = planner.Deployment(gpu=gpu, runtime="transformers", dtype=dtype, mode="eager")
    return planner.estimate(LLAMA, work, deploy).latency


def width(interval):
    return (interval[1] - interval[0]) / sum(interval)


def test_the_cpu_that_was_timed_is_interpolated_and_another_is_not():
    with as_on(TIMED):
        same = latency()
    with as_on(OTHER):
        other = latency()
    assert same.basis == f"ops measured on {TIMED.in_words}"
    assert other.basis == f"ops measured on {TIMED.in_words}, not on Another CPU, 16 threads"
    assert (same.confidence, other.confidence) == ("interpolated", "extrapolated")
    assert width(same.ttft_interval_s) < 0.5 < 0.79 < width(other.ttft_interval_s)
    assert other.ttft_s == same.ttft_s


def test_ones_own_file_comes_before_the_catalogue_and_counts_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANNER_CALIBRATION", str(tmp_path))
    content = json.loads(COMMITTED.joinpath("cpu.json").read_text())
    content["machine"] = {"name": OTHER.name, "threads": OTHER.threads}
    with as_on(OTHER):
        assert latency().confidence == "extrapolated"
        (tmp_path / "cpu.json").write_text(json.dumps(content))
        assert latency().basis == "ops measured here"
        assert latency().confidence == "interpolated"
    with as_on(TIMED):  # of both the one that was measured on what is asked about
        assert latency().basis == f"ops measured on {TIMED.in_words}"


def test_ones_own_file_of_a_gpu_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANNER_CALIBRATION", str(tmp_path))
    shutil.copy(str(COMMITTED.joinpath("h200.json")), tmp_path)
    own = tmp_path / "h200.json"
    assert latency("bf16", "h200").basis == f"ops measured on h200 ({own})"


def test_what_is_no_calibration_is_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANNER_CALIBRATION", str(tmp_path))
    (tmp_path / "cpu.json").write_text('{"schema": 1}')
    with pytest.raises(ConfigError, match=r"cpu\.json is no calibration"):
        latency()


def test_a_dtype_in_which_nothing_was_timed_is_uncalibrated():
    with as_on(TIMED):
        made = latency("bf16")
    assert made.basis == "uncalibrated roofline: no product was timed in bf16 on a CPU"
    assert made.confidence == "uncalibrated"
    assert width(made.tpot_interval_s) > 0.79
