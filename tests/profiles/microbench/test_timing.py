"""How a call is timed; torch.cuda is replaced at its edge, the machine of the tests has none."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from profiles.microbench import timing

CUDA = SimpleNamespace(type="cuda")


class FakeGraph:
    def replay(self):
        time.sleep(1e-4)

    def reset(self):
        pass


class FakeEvent:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at_s = time.perf_counter()

    def elapsed_time(self, end):
        return (end.at_s - self.at_s) * 1e3


@pytest.fixture
def fake_cuda(monkeypatch):
    """The functions of torch.cuda that timing calls, on the clock of this machine."""
    slept = []

    @contextlib.contextmanager
    def capture(graph, stream):
        assert isinstance(graph, FakeGraph)
        assert stream == "ours"
        yield

    for name, value in {
        "CUDAGraph": FakeGraph,
        "Event": FakeEvent,
        "graph": capture,
        "current_stream": lambda: "ours",
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "memory_allocated": lambda device: 1000,
        "max_memory_allocated": lambda device: 5000,
        "reset_peak_memory_stats": lambda device: None,
        "_sleep": slept.append,
        "Stream": lambda: "another",
        "set_stream": lambda stream: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return slept


def prepared():
    made = []

    def prepare():
        made.append(None)
        return lambda: time.sleep(1e-5)

    return prepare, made


def test_a_call_is_captured_over_inputs_of_its_own_and_replayed(fake_cuda):
    prepare, made = prepared()
    timed = timing.time_on_device(prepare, CUDA, cold_copies=30)
    assert timed.method == "graph"
    assert timed.copies == len(made) > 1  # fewer of them on a slow machine
    assert len(timed.samples_s) == timing.REPLAYS
    assert not fake_cuda


def test_warm_calls_share_their_inputs(fake_cuda):
    prepare, made = prepared()
    timed = timing.time_on_device(prepare, CUDA, cold_copies=30, warm=True)
    assert len(made) == 1 < timed.copies


def test_what_cannot_be_captured_is_issued_behind_a_busy_kernel(fake_cuda, monkeypatch):
    @contextlib.contextmanager
    def refuse(graph, stream):
        yield
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    timed = timing.time_on_device(prepared()[0], CUDA, cold_copies=4)
    assert timed.method == "loop"
    assert timed.note == "not captured: operation not permitted when stream is capturing"
    assert len(fake_cuda) == timing.REPLAYS


@pytest.mark.parametrize(
    ("estimate_s", "call_bytes", "cold_copies", "expected"),
    [
        (1e-5, 0, 1, 128),  # 200 for 2 ms of work, and no more than 128
        (1e-4, 0, 1, 20),
        (1e-3, 0, 60, 40),  # no longer than 40 ms
        (1e-3, 3 * 2**30, 1, 2),  # outputs of 8 GiB in all
        (1.0, 2**40, 1, 1),
    ],
)
def test_copies_are_enough_to_time_and_no_more_than_fits(
    estimate_s, call_bytes, cold_copies, expected
):
    assert timing.copies_for(estimate_s, call_bytes, cold_copies=cold_copies) == expected


def test_host_cost_is_per_call():
    calls = []
    timed = timing.time_on_host(lambda: calls.append(None), torch.device("cpu"), calls=10)
    assert len(calls) == 20 + 10 * timing.REPLAYS
    assert timed.method == "host"
    assert max(timed.samples_s) < 1e-3


def test_energy_is_that_of_one_call(fake_cuda):
    readings = iter([100.0, 130.0])
    timed = timing.time_sustained(prepared()[0], CUDA, lambda: next(readings), seconds=0.01)
    assert timed.energy_j == pytest.approx(30.0 / timed.copies)
    assert timed.method == "sustained"


def test_without_a_counter_there_is_no_energy():
    timed = timing.time_idle(lambda: None, seconds=0.01)
    assert timed.energy_j is None
    assert timed.samples_s[0] >= 0.01
