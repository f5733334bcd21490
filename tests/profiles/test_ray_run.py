"""A suite over a Ray of this machine: the same records, the same worker."""

import os
from pathlib import Path

import pytest

from planner import ConfigError
from profiles import records
from profiles.compare import compare
from profiles.points import Point, SuitePoint
from profiles.ray_run import run_on_ray

ROOT = Path(__file__).parents[2]


def point(tokens):
    run = Point(phase="prefill", batch=1, prompt_tokens=tokens, repeats=1, warmup=0)
    return SuitePoint(model="llama-50m", run=run, split="held-out", runtime="attnlab")


@pytest.mark.filterwarnings("ignore")  # ray's own
def test_a_local_ray_measures_every_point_and_stores_it(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="ray is an optional extra")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    monkeypatch.setenv("PYTHONPATH", paths)  # Ray's processes import from here
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    seen = []
    run = run_on_ray(
        "test",
        address=None,
        device="cpu",
        out=tmp_path / "r.jsonl",
        points=[point(8), point(9)],
        points_per_task=1,
        on_progress=seen.append,
    )
    assert sorted(r.prompt_tokens for r in run.records) == [8, 9]
    assert {r.status for r in run.records} == {"ok"}
    assert run.skipped == ()
    assert records.load([tmp_path / "r.jsonl"]) == (list(run.records), [])
    assert [p.done for p in seen] == [1, 2]
    exact = [r for r in compare(run.records) if r.quantity.endswith("_bytes")]
    assert exact
    assert all(r.predicted == r.measured for r in exact)


def test_a_device_that_is_no_device_is_refused_first(tmp_path):
    with pytest.raises(ConfigError, match="device='tpu'"):
        run_on_ray("smoke", address=None, device="tpu", out=tmp_path / "r.jsonl")
