"""The steps on the CPU where it can run them; the CUDA allocator and the driver are faked."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pynvml
import pytest
import torch

from planner import ConfigError
from profiles import nvml, overheads
from profiles.overhead_steps import STEPS
from profiles.overheads import BEFORE, from_json, growth_bytes, measure_overheads, to_json

CPU = torch.device("cpu")
MIB = 2**20

ON_THE_CPU = (
    "tiny tensor",
    "elementwise kernels",
    "matmul bf16",
    "linear with bias bf16",
    "matmul fp16",
    "matmul fp32",
    "matmul tf32",
    "scaled_mm fp8",
    "sdpa flash",
    "sdpa math",
    "backward of a matmul",
    "sdpa flash with backward",
    "sdpa math with backward",
    "fused AdamW",
)


@pytest.fixture
def device(monkeypatch):
    """A CUDA allocator and a driver that know each other."""
    state = SimpleNamespace(allocated=0, reserved=0, peak=0, outside=500 * MIB, waits=0)

    def stats(device):
        names = ("allocated_bytes.all.current", "allocated_bytes.all.peak")
        return {
            **dict(zip(names, (state.allocated, state.peak), strict=True)),
            "reserved_bytes.all.current": state.reserved,
        }

    def wait(device):
        state.waits += 1

    def memory(handle, version=None):
        return SimpleNamespace(used=state.reserved + state.outside, reserved=60, total=10**12)

    processes = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=7)]
    edge = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: "handle",
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: processes,
        "nvmlSystemGetDriverVersion": lambda: "580.1",
    }
    for name, function in edge.items():
        monkeypatch.setattr(pynvml, name, function)
    monkeypatch.setattr(torch.cuda, "memory_stats", stats)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: state.reserved)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    return state


@pytest.fixture
def steps(device):
    """A context, a workspace that stays, something held until it is looked at, and two failures."""

    def matmul(_):
        device.allocated += 32 * MIB
        device.reserved += 34 * MIB
        device.peak = device.allocated + MIB

    class Graph:
        def __init__(self):
            device.outside += MIB

        def __del__(self):
            device.outside -= MIB

    def oom(_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fail(_):
        raise RuntimeError("no kernel image\nmore")

    def init(_):
        device.outside += 8 * MIB

    return {
        "init": init,
        "matmul": matmul,
        "graph": lambda _: Graph(),
        "dropped": lambda _: None,
        "too large": oom,
        "broken": fail,
    }


def measured(steps, **options):
    with nvml.open_device(0) as driver:
        return measure_overheads(CPU, driver, before_bytes=500 * MIB, steps=steps, **options)


def test_each_step_shows_what_it_added(steps):
    rows = measured(steps)
    assert [row.step for row in rows] == [BEFORE, *steps]
    growth = dict(zip(steps, growth_bytes(rows), strict=True))
    assert growth["init"]["used_bytes"] == 8 * MIB
    assert growth["matmul"]["allocated_bytes"] == 32 * MIB
    assert growth["matmul"]["reserved_bytes"] == growth["matmul"]["used_bytes"] == 34 * MIB
    assert growth["graph"]["used_bytes"] == MIB
    assert growth["dropped"]["used_bytes"] == -MIB
    assert growth["init"]["allocated_bytes"] is None  # nothing was asked of torch before it
    assert {row.process_used_bytes for row in rows[1:]} == {7}
    assert {row.driver_reserve_bytes for row in rows} == {60}


def test_nothing_waits_for_a_device_that_was_not_used_yet(device, steps):
    measured({"init": steps["init"]})
    assert device.waits == 0
    measured({"matmul": steps["matmul"]})
    assert device.waits == 1


def test_a_step_that_fails_is_a_row(steps):
    *_, too_large, broken = measured(steps)
    assert (too_large.status, broken.status) == ("oom", "error: RuntimeError: no kernel image")
    assert broken.used_bytes is not None


def test_rows_are_told_one_by_one(steps):
    seen = []
    assert measured(steps, on_row=seen.append) == seen


def test_a_row_survives_json(steps):
    for row in measured(steps):
        assert from_json(to_json(row)) == row


def test_other_lines_are_refused(steps):
    row = measured({})[0]
    for line in ("{", "[]", '{"schema": 2}', to_json(row).replace('"step"', '"stop"')):
        with pytest.raises(ConfigError):
            from_json(line)
    with pytest.raises(ConfigError, match="schema=2"):
        replace(row, schema=2)


def test_rows_are_appended_to_the_file(steps, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(overheads.environment, "find_device", lambda name: CPU)
    monkeypatch.setattr(overheads.nvml, "used_bytes_by_uuid", lambda: {})
    monkeypatch.setattr(overheads, "measure_overheads", lambda *a, on_row, **o: on_row(row))
    row = measured({})[0]
    out = tmp_path / "new" / "overheads.jsonl"
    for _ in range(2):
        assert overheads.main(["--out", str(out)]) == 0
    assert [from_json(line) for line in out.read_text().splitlines()] == [row, row]
    assert BEFORE in capsys.readouterr().out


@pytest.mark.parametrize("name", ON_THE_CPU)
def test_steps_run(name):
    STEPS[name](CPU)


def test_steps_leave_the_precision_of_products_alone():
    before = torch.get_float32_matmul_precision()
    STEPS["matmul tf32"](CPU)
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_cuda_it_says_so_in_one_line(tmp_path):
    command = [sys.executable, "-m", "profiles.overheads", "--out", str(tmp_path / "o.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "finds no CUDA device" in done.stderr
    assert not (tmp_path / "o.jsonl").exists()
