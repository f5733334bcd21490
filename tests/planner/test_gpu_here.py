"""`gpu="auto"`: the driver is faked at pynvml's edge only."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from planner import ConfigError
from planner.catalog.gpus import gpu_named


@pytest.fixture
def card(monkeypatch):
    """A driver with one card; what it says of it may be changed."""
    said = SimpleNamespace(name=b"NVIDIA H200", free=100 << 30)
    edge = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: said.name,
        "nvmlDeviceGetMemoryInfo": lambda handle, version: SimpleNamespace(free=said.free),
    }
    for name, function in edge.items():
        monkeypatch.setattr(pynvml, name, function)
    return said


def test_auto_is_the_card_that_is_here_with_what_is_free_on_it(card):
    found = gpu_named("auto")
    assert found.name == "h200"
    assert found.memory_bytes == card.free


def test_no_more_is_free_than_torch_sees(card):
    card.free = 1 << 50
    assert gpu_named("auto").memory_bytes == gpu_named("h200").memory_bytes


def test_a_card_outside_the_catalogue_is_named(card):
    card.name = "NVIDIA Riva 128"
    with pytest.raises(ConfigError, match="gpu='auto' is 'NVIDIA Riva 128' here, which is not in"):
        gpu_named("auto")


def test_without_a_driver_auto_is_refused_in_one_line(monkeypatch):
    def fails():
        raise pynvml.NVMLError_LibraryNotFound

    monkeypatch.setattr(pynvml, "nvmlInit", fails)
    with pytest.raises(ConfigError, match="gpu='auto' is not allowed here: no NVIDIA driver"):
        gpu_named("auto")
