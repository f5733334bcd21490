"""The sampler on a fake driver: pynvml's functions, and nothing above them."""

import json
import time
from types import SimpleNamespace

import pynvml
import pytest

from planner import ConfigError
from profiles import nvml
from profiles.sampler import Sampler, Series, cost_line, to_json


@pytest.fixture
def driver(monkeypatch):
    """A device whose used bytes grow by one with every reading."""
    state = SimpleNamespace(used=1000, call_s=0.0)

    def memory(handle, version=None):
        assert version == pynvml.nvmlMemory_v2
        time.sleep(state.call_s)
        state.used += 1
        return SimpleNamespace(total=9000, used=state.used, reserved=60)

    edge = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: "handle",
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetClockInfo": lambda handle, kind: 1980,
        "nvmlDeviceGetPowerUsage": lambda handle: 120_500,
        "nvmlDeviceGetTemperature": lambda handle, sensor: 41,
        "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=50),
    }
    for name, function in edge.items():
        monkeypatch.setattr(pynvml, name, function)
    return state


def sampled(run=lambda sampler: time.sleep(0.05), **options):
    with nvml.open_device(0) as device, Sampler(device, interval_s=0.005, **options) as sampler:
        run(sampler)
    return sampler


def test_a_run_becomes_a_series_with_marks(driver):
    def run(sampler):
        time.sleep(0.02)
        sampler.mark("prefill")
        time.sleep(0.02)
        sampler.mark("decode")
        time.sleep(0.02)

    series = sampled(run).series
    assert series.error is None
    assert [mark.name for mark in series.marks] == ["prefill", "decode"]
    assert len(series.time_s) >= 3
    assert list(series.used_bytes) == sorted(series.used_bytes)
    assert set(series.power_w) == {120.5}
    assert set(series.sm_clock_hz) == {1_980_000_000}
    assert set(series.temperature_c) == {41}
    assert set(series.utilisation) == {0.5}
    start, end = series.phase_s("prefill")
    assert (start, end) == tuple(mark.time_s for mark in series.marks)
    assert series.phase_s("decode")[1] == series.duration_s
    assert series.peak_used_bytes() == series.used_bytes[-1]
    assert series.peak_used_bytes("prefill") < series.peak_used_bytes()
    with pytest.raises(ConfigError, match="mark='loading'"):
        series.phase_s("loading")


def test_the_last_moment_is_sampled(driver):
    series = sampled(lambda sampler: None).series
    assert len(series.time_s) >= 2


def test_its_own_cost_is_measured(driver):
    driver.call_s = 0.004
    series = sampled().series
    assert 0.004 <= series.cost_per_sample_s < 0.1
    assert 0.2 < series.cost_fraction <= 1.1
    assert "ms each" in cost_line(series)


def test_the_thread_ends_when_the_block_raises(driver):
    with (
        nvml.open_device(0) as device,
        pytest.raises(ZeroDivisionError),
        Sampler(device) as sampler,
    ):
        raise ZeroDivisionError
    assert not sampler._thread.is_alive()
    assert sampler.series.time_s


def test_an_error_in_the_thread_is_reported_and_the_samples_before_it_are_kept(driver, monkeypatch):
    def run(sampler):
        time.sleep(0.02)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lost)
        time.sleep(0.03)

    def lost(handle):
        raise pynvml.NVMLError_GpuIsLost

    series = sampled(run).series
    assert "NVMLError_GpuIsLost" in series.error
    assert series.used_bytes[0] == 1001
    assert "ended early" in cost_line(series)


def test_what_the_device_does_not_say_is_none(driver, monkeypatch):
    def refuse(handle):
        raise pynvml.NVMLError_NotSupported

    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", refuse)
    series = sampled().series
    assert series.error is None
    assert set(series.power_w) == {None}


def test_without_a_device_there_are_marks_and_no_samples():
    with Sampler(None) as sampler:
        sampler.mark("load")
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = sampler.series
    assert sampler.series.time_s == ()
    assert sampler.series.peak_used_bytes() is None
    assert cost_line(sampler.series) == "NVML: no samples"
    assert [mark.name for mark in sampler.series.marks] == ["load"]


def test_a_series_survives_json(driver):
    series = sampled(lambda sampler: (sampler.mark("load"), time.sleep(0.03))).series
    assert Series.from_json_dict(json.loads(to_json(series))) == series


def test_equal_samples_are_written_once():
    values = {name: (7,) * 500 for name in Series.__slots__ if name.endswith(("_hz", "_c", "_w"))}
    series = Series(
        started_utc="",
        interval_s=0.02,
        duration_s=10.0,
        nvml_s=0.1,
        time_s=tuple(round(0.02 * i, 6) for i in range(500)),
        used_bytes=(150_000_000_000,) * 500,
        utilisation=(None,) * 500,
        **values,
    )
    assert len(to_json(series)) < 4000
    assert Series.from_json_dict(json.loads(to_json(series))) == series


@pytest.mark.parametrize(
    "content",
    [[], {}, {"schema": 2}, {"schema": 1}, {"schema": 1, "time_steps_us": [1], "used_bytes": [1]}],
)
def test_other_content_is_refused(content):
    with pytest.raises(ConfigError, match="not a series"):
        Series.from_json_dict(content)


@pytest.mark.parametrize("interval_s", [0, -1, float("nan"), "1"])
def test_an_interval_is_a_time(interval_s):
    with pytest.raises(ConfigError, match="interval_s="):
        Sampler(None, interval_s=interval_s)
