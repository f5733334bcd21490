"""A store of its own for every test: what the machine has measured is out of sight."""

from functools import cache

import pytest
from streamlit.components.v2 import manifest_scanner

import planner
from profiles import records


@pytest.fixture(scope="session", autouse=True)
def installed_components():
    """Streamlit looks through all that is installed once, not for every app that is run."""
    with pytest.MonkeyPatch.context() as patch:
        scan = manifest_scanner.scan_component_manifests
        patch.setattr(manifest_scanner, "scan_component_manifests", cache(scan))
        yield


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The path of an empty store; nothing else is read."""
    monkeypatch.setattr(records, "DATA", tmp_path / "committed")
    monkeypatch.chdir(tmp_path)
    return tmp_path / records.DEFAULT_OUT


@pytest.fixture(scope="session")
def estimates():
    """One estimate that fits, one that does not, one with a pool."""
    work = planner.Inference(batch=4, prompt_tokens=512, output_tokens=64, logits="last")

    def of(model, **deploy):
        return planner.estimate(planner.load_model(model), work, planner.Deployment(**deploy))

    return {
        "fits": of("llama-3.1-8b", gpu="h200"),
        "too large": of("llama-3.1-70b", gpu="t4", dtype="fp16"),
        "pool": of("qwen2.5-7b", gpu="a100-80gb", runtime="vllm"),
        "pool of nothing": of("llama-3.1-70b", gpu="t4", runtime="vllm"),
        "cpu": of("llama-50m", gpu="cpu", runtime="attnlab"),
    }
