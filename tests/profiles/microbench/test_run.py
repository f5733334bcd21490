"""A run on this CPU: bounded, resumable, and no failure ends it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from profiles.microbench import op_record, run
from profiles.microbench.__main__ import main
from profiles.microbench.buffers import Buffers, PoolError
from profiles.microbench.point import OpPoint
from profiles.microbench.points import points

ROOT = Path(__file__).parents[3]
TINY = [
    OpPoint(family="gemm", op="linear", shape={"m": m, "n": 32, "k": 32}, dtype="fp32")
    for m in (1, 2, 4)
]


@pytest.fixture
def few(monkeypatch):
    """Three tiny products instead of the list."""
    monkeypatch.setattr(run, "points", lambda device, families: list(TINY))
    monkeypatch.setattr(run, "pool_bytes", lambda device, free: 2**20)


def test_a_run_records_every_point_with_its_samples(few, tmp_path):
    out = tmp_path / "ops.jsonl"
    records = run.run("cpu", out=out)
    stored = op_record.load(out)
    assert [record.key for record in records] == [point.key for point in TINY]
    assert len(stored.ops) == 3
    assert not stored.problems
    for record in stored.ops:
        assert record.status == "ok"
        assert record.method == "clock"
        assert len(record.samples_s) == 5
        assert min(record.samples_s) > 0
        assert stored.environments[record.environment].device == "cpu"


def test_a_second_run_measures_only_what_is_missing(few, tmp_path, monkeypatch):
    out = tmp_path / "ops.jsonl"
    run.run("cpu", out=out)
    more = OpPoint(family="bandwidth", op="add", shape={"rows": 2, "width": 8}, dtype="fp32")
    monkeypatch.setattr(run, "points", lambda device, families: [*TINY, more])
    assert [record.key for record in run.run("cpu", out=out)] == [more.key]
    assert len(run.run("cpu", out=out, only_missing=False)) == 4


def test_a_point_that_fails_is_recorded_and_the_next_is_measured(few, tmp_path, monkeypatch):
    too_large = OpPoint(
        family="gemm", op="linear", shape={"m": 1, "n": 4096, "k": 4096}, dtype="fp32"
    )
    unknown = OpPoint(family="bandwidth", op="fft", shape={"rows": 1, "width": 1}, dtype="fp32")
    monkeypatch.setattr(run.costs, "floor_bytes", lambda point: 1)
    monkeypatch.setattr(run, "points", lambda device, families: [too_large, unknown, TINY[0]])
    statuses = [record.status for record in run.run("cpu", out=tmp_path / "ops.jsonl")]
    assert statuses[0].startswith("error: PoolError: an input of 67108864 bytes")
    assert statuses[1].startswith("error: KeyError")
    assert statuses[2] == "ok"


def test_a_point_that_takes_the_device_down_ends_the_run_and_is_not_tried_again(
    few, tmp_path, monkeypatch
):
    out = tmp_path / "ops.jsonl"

    def die(bench, point, preparer):
        if point is TINY[1]:
            bench.lost = True
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return real(bench, point, preparer)

    real = run.Bench._time
    monkeypatch.setattr(run.Bench, "_time", die)
    assert [record.status[:5] for record in run.run("cpu", out=out)] == ["ok", "error"]
    assert [record.key for record in run.run("cpu", out=out)] == [TINY[2].key]


def test_a_spent_budget_measures_nothing(few, tmp_path):
    assert run.run("cpu", out=tmp_path / "ops.jsonl", budget_s=0.0) == []


def test_a_run_killed_in_the_middle_is_taken_up_where_it_stopped(tmp_path):
    out = tmp_path / "ops.jsonl"
    command = [sys.executable, "-m", "profiles.microbench", "--device", "cpu"]
    command += ["--family", "host", "--out", str(out)]
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    child = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (out.exists() and len(op_record.load(out).ops) >= 2):
        assert child.poll() is None or op_record.load(out).ops
        assert time.monotonic() < deadline
        if child.poll() is not None:
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    with open(out, "ab") as store:
        store.write(b'{"kind":"op","sche')  # what a kill leaves in the middle of a line
    first = op_record.load(out)
    assert "torn last line" in first.problems[0]
    run.run("cpu", out=out, families=["host"])
    everything = op_record.load(out)
    assert {record.key for record in everything.ops} == {p.key for p in points("cpu", ["host"])}
    again = [record.key for record in everything.ops]
    assert len(again) == len(set(again))


def test_the_command_prints_a_table(few, tmp_path, capsys):
    out = tmp_path / "ops.jsonl"
    assert main(["--device", "cpu", "--budget", "60", "--out", str(out), "--missing"]) == 0
    printed = capsys.readouterr().out
    assert "gemm" in printed
    assert "3 points" in printed


def test_cuts_of_the_pool_do_not_overlap_until_it_is_used_up():
    buffers = Buffers(device=torch.device("cpu"), pool_bytes=2**14)
    first, second = buffers.take("bf16", 10, 10), buffers.take("bf16", 100)
    assert second.data_ptr() - first.data_ptr() == 256  # 200 bytes, aligned
    assert torch.equal(buffers.take("bf16", 8192)[:100], first.flatten())
    with pytest.raises(PoolError):
        buffers.take("bf16", 8193)
