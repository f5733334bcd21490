"""Suites on the CPU: isolated points, budgets, what is missing, and everything that goes wrong."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import pytest

from planner import ConfigError
from profiles import records, suite_run
from profiles.points import Point, SuitePoint
from profiles.suite_run import run_points, run_suite
from profiles.suites import CALIBRATION, SUITES, suite_points
from tests.profiles import doomed


@pytest.fixture(autouse=True)
def own_locks(tmp_path, monkeypatch):
    """Tests run side by side: a device is locked among those of one test alone."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


def point(model, tokens=8):
    run = Point(phase="prefill", batch=1, prompt_tokens=tokens, repeats=1, warmup=0)
    return SuitePoint(model=model, run=run, split="held-out", runtime="attnlab")


def measured(points, tmp_path, **options):
    options = {"device": "cpu", "out": tmp_path / "r.jsonl", "measure": doomed.fated} | options
    return run_points("test", points, **options)


@pytest.mark.parametrize("name", SUITES)
def test_every_point_of_a_suite_has_a_name_of_its_own_and_a_side(name):
    points = suite_points(name)
    assert len({p.name for p in points}) == len(points)
    assert {p.split for p in points} <= set(records.SPLITS)


def test_what_may_be_fitted_on_is_in_the_suites_and_is_not_much():
    points = [p for name in SUITES for p in suite_points(name)]
    fitted = {(p.model, p.run.sizes) for p in points if p.split == "calibration"}
    assert fitted == CALIBRATION
    held_out = {p.model for p in points if p.split == "held-out"}
    assert len(held_out) > 10


@pytest.mark.parametrize("number", [0, 1])
def test_where_times_alone_are_wanted_memory_is_not_measured(number, tmp_path):
    timed = replace(suite_points("smoke")[number], times_only=True)
    (record,) = run_points("test", [timed], device="cpu", out=tmp_path / "r.jsonl").records
    assert record.status == "ok"
    assert record.attention.startswith("sdpa:flash_cpu")
    assert len(record.step_s) + len(record.ttft_s) == len(record.host_add_s) > 0
    assert record.weights_bytes is record.peak_live_bytes is record.gradients_bytes is None


def test_a_suite_is_measured_and_agrees_with_the_planner_to_the_byte(tmp_path):
    from profiles.compare import compare

    run = run_suite("smoke", device="cpu", out=tmp_path / "r.jsonl")
    assert [r.status for r in run.records] == ["ok"] * 4
    assert {r.suite for r in run.records} == {"smoke"}
    exact = [r for r in compare(run.records) if r.quantity.endswith("_bytes")]
    assert {r.quantity for r in exact} >= {"optimizer_bytes", "gradients_bytes", "kv_cache_bytes"}
    assert all(r.predicted == r.measured for r in exact)
    assert records.load([tmp_path / "r.jsonl"]) == (list(run.records), [])


def test_a_crash_a_hang_and_an_error_are_records_and_the_others_are_measured(tmp_path):
    models = ("gpt2", "gpt2-medium", "gpt2-large", "llama-50m")
    run = measured([point(m) for m in models], tmp_path, point_timeout_s=8)
    assert [r.status for r in run.records] == [
        "error: the process died of SIGSEGV",
        "error: timed out after 8 s",
        "error: RuntimeError: first line",
        "ok",
    ]
    assert [r.model for r in run.records] == list(models)
    assert records.load([tmp_path / "r.jsonl"])[0] == list(run.records)


def test_only_what_is_missing_is_measured_again(tmp_path):
    points = [point("gpt2-large"), point("llama-50m")]
    measured(points, tmp_path)
    again = measured(points, tmp_path, only_missing=True)
    assert [r.model for r in again.records] == ["gpt2-large"]
    assert again.skipped == ("llama-50m attnlab prefill 1 × 8: measured before",)


def test_no_point_begins_after_the_budget(tmp_path):
    run = measured([point("llama-50m"), point("llama-50m", 9)], tmp_path, budget_s=1e-3)
    assert run.records == ()
    assert all(reason.endswith("the budget was used up") for reason in run.skipped)


def test_what_cannot_fit_a_cpu_is_not_tried(tmp_path):
    run = measured([point("llama-3.1-405b")], tmp_path)
    assert run.records == ()
    assert "needs 7" in run.skipped[0]
    assert "GiB available" in run.skipped[0]


def test_progress_tells_what_begins_and_what_ended(tmp_path):
    seen = []
    measured([point("llama-50m")], tmp_path, on_progress=seen.append)
    assert [(p.done, p.total, p.record is None) for p in seen] == [(0, 1, True), (1, 1, False)]
    assert seen[0].eta_s is None
    assert seen[1].eta_s == 0


def test_a_second_profiler_is_refused_while_the_first_works(tmp_path):
    with suite_run._locked("cpu"), pytest.raises(ConfigError, match="device=cpu is being measured"):
        measured([point("llama-50m")], tmp_path)


def test_a_killed_run_loses_the_running_point_alone_and_leaves_no_process(tmp_path):
    """kill -9 of the profiler while its second point hangs."""
    script = (
        "from tests.profiles import test_suite_run as t, doomed\n"
        "from profiles.suite_run import run_points\n"
        "import pathlib, sys\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "options = dict(device='cpu', out=here / 'r.jsonl')\n"
        "if __name__ == '__main__':\n"
        "    run_points('test', [t.point('llama-50m')], **options)\n"
        "    run_points('test', [t.point('llama-50m', 9)], measure=doomed.slowly, **options)\n"
    )
    (tmp_path / "killed.py").write_text(script)
    pids = tmp_path / "pids"
    env = os.environ | {"FATED_PIDS": str(pids), "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "killed.py"), str(tmp_path)], env=env
    )
    deadline = time.monotonic() + 120
    while not (pids.exists() and pids.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    child = int(pids.read_text())
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    stored, problems = records.load([tmp_path / "r.jsonl"])
    assert [(r.prompt_tokens, r.status) for r in stored] == [(8, "ok")]
    assert problems == []


def _runs(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_an_unknown_suite_and_an_unwritable_file_are_refused(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ConfigError, match=r"suite='none' .* smoke"):
        run_suite("none", device="cpu", out=tmp_path / "r.jsonl")
    with pytest.raises(ConfigError, match="cannot be written"):
        run_suite("smoke", device="cpu", out=tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
