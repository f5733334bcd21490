"""Every op of a GPU's list that a CPU has, run and recorded at small sizes."""

import dataclasses

import pytest

from profiles.microbench import run
from profiles.microbench.points import points

SMALLEST = {"reached": 4, "values": 4, "rotary": 4, "top_k": 2, "kernel": 4, "pad": 4, "tensors": 8}
OWN_WAY = ("host", "graph", "allocator", "sustained", "optimizer")
CUDA_ONLY = ("scaled_mm",)


def small(point):
    """The same op at sizes of eight; which kernel of attention runs is the CPU's choice."""
    shape = {name: min(size, SMALLEST.get(name, 8)) for name, size in point.shape.items()}
    return dataclasses.replace(point, shape=shape, backend="default", repeat=0)


@pytest.fixture
def every_op(monkeypatch):
    """One point of each op and dtype."""
    chosen = [p for p in points("cuda") if p.family not in OWN_WAY and p.op not in CUDA_ONLY]
    kinds = {(p.family, p.op, p.dtype): small(p) for p in chosen}
    monkeypatch.setattr(run, "points", lambda device, families: list(kinds.values()))
    monkeypatch.setattr(run, "pool_bytes", lambda device, free: 2**22)
    monkeypatch.setattr("profiles.microbench.timing.REPLAY_S", 1e-5)
    return kinds


def test_every_op_runs_and_is_timed(every_op, tmp_path):
    records = run.run("cpu", out=tmp_path / "ops.jsonl")
    assert len(records) == len(every_op)
    assert {record.key: record.status for record in records if record.status != "ok"} == {}
