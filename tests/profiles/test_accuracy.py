"""The promise of the project, on what an H200 measured.

No constant is fitted on held-out rows, but rules were corrected after they were seen.
"""

import statistics

import numpy as np
import pytest

from planner import ConfigError
from profiles import records
from profiles.compare import compare, estimate_of

PROMISED = {"peak_allocated_bytes": 0.01, "peak_reserved_bytes": 0.02, "device_used_bytes": 0.02}
WORST = 0.05
TIMES = ("ttft_s", "tpot_s", "step_s", "replay_s")
TIMES_MEAN, TIMES_P90 = 0.07, 0.15
METHODS = "methods"
"""The suite of further ways to train, measured once: QLoRA, DoRA, master weights and others."""


@pytest.fixture(scope="module")
def stored():
    found, problems = records.load([records.DATA / "h200.jsonl"])
    assert problems == []
    return found


@pytest.fixture(scope="module")
def held_out(stored):
    return [row for row in compare(stored) if row.split == "held-out" and row.predicted is not None]


@pytest.mark.parametrize("quantity", PROMISED)
def test_the_gpu_s_memory_is_predicted_within_the_promise(held_out, quantity):
    """But for further ways to train ten times better than promised."""
    rows = [row for row in held_out if row.quantity == quantity]
    usual = [abs(row.relative_error) for row in rows if row.suite != METHODS]
    others = [abs(row.relative_error) for row in rows if row.suite == METHODS]
    assert len(usual) > 100
    assert sum(usual) / len(usual) <= PROMISED[quantity] / 10
    assert max(usual) <= WORST / 10
    assert len(others) > 20
    assert sum(others) / len(others) <= PROMISED[quantity] / 5
    assert max(others) <= WORST / 4


@pytest.mark.parametrize("quantity", [*TIMES, "all"])
def test_times_are_predicted_within_the_promise_where_the_host_was_read(stored, held_out, quantity):
    """In the runs that read their host's speed before every step; replayed steps have no host."""
    known = {r.id for r in stored if r.reads_host_each_step or r.mode == "graph"}
    wanted = TIMES if quantity == "all" else (quantity,)
    rows = [row for row in held_out if row.record in known and row.quantity in wanted]
    off = [abs(row.relative_error) for row in rows if row.relative_error is not None]
    assert len(off) > 20
    assert statistics.fmean(off) <= TIMES_MEAN
    assert np.quantile(off, 0.9) <= TIMES_P90


def test_what_tensors_hold_is_exact(held_out):
    exact = ("weights_bytes", "kv_cache_bytes", "gradients_bytes", "optimizer_bytes")
    rows = [row for row in held_out if row.quantity in exact]
    assert len(rows) > 40
    assert all(row.predicted == row.measured for row in rows)


def test_what_tensors_hold_at_the_peak_is_exact(held_out):
    rows = [row for row in held_out if row.quantity == "peak_live_bytes"]
    assert len(rows) >= 90
    assert all(row.predicted == row.measured for row in rows)


def test_what_torch_allocates_is_mostly_exact(held_out):
    """To the 512 bytes of a number that earlier versions of the profiler held, too."""
    rows = [row for row in held_out if row.quantity == "peak_allocated_bytes"]
    exact = [row for row in rows if abs(row.predicted - row.measured) <= 512]
    usual = [row for row in rows if row.suite != METHODS]
    assert len(exact) >= 0.9 * len(rows)
    assert max(abs(row.relative_error) for row in usual) < 0.0001
    assert max(abs(row.relative_error) for row in rows) < 0.001


def test_what_torch_reserves_for_inference_is_mostly_exact(held_out):
    rows = [r for r in held_out if r.quantity == "peak_reserved_bytes" and r.phase != "training"]
    exact = [r for r in rows if r.predicted == r.measured]
    others = [r for r in rows if r.predicted != r.measured]
    assert len(exact) >= 70
    assert {r.model for r in others if r.suite != "caches"} <= {
        "bamba-9b",  # cuDNN's scratch of a convolution is not modelled
        "deepseek-v2-lite",
        "qwen1.5-moe-a2.7b",
    }  # see addresses.py
    assert [r.model for r in others if r.suite == "caches"] == ["llama-3.1-8b"]  # KIVI's
    assert max(abs(r.relative_error) for r in others) < 0.0035


def test_many_models_are_held_out(held_out):
    memory = [row for row in held_out if row.quantity.endswith("_bytes")]
    assert len(memory) >= 100
    assert len({row.model for row in memory}) >= 12


def test_what_is_asked_for_at_the_peak_is_exact(stored):
    """To the 4 bytes that an earlier version of the profiler held, and what bitsandbytes asks for
    in passing; not yet rounded to blocks."""
    apart = []
    for record in stored:
        try:
            played = estimate_of(record).allocator()
        except ConfigError:
            continue
        if record.peak_requested_bytes is not None and played is not None:
            apart.append(record.peak_requested_bytes - played.stats.peak_requested_bytes)
    assert len(apart) >= 116
    assert set(apart) <= {0, 4, 1024, 2048}
    assert sum(bytes_ > 4 for bytes_ in apart) <= 3


def test_a_step_of_autocast_is_exact(held_out):
    """Its record has the dtype of the weights, fp32."""
    steps = [row for row in held_out if row.record == "438033248e0a" and "_bytes" in row.quantity]
    assert len(steps) == 7
    assert all(row.predicted == row.measured for row in steps)
