"""The counts in the catalogue are those of the installed classes."""

import json
from importlib import metadata

import pytest

from planner.timing.host_calls import counted as known
from planner.timing.host_calls import more_of
from planner.timing.host_calls import trained as known_trained
from tools.host_calls import OUT, beyond, caches, parts, python_calls, trained

PYTHONS = 0.1
"""Python versions call differently: 3.12 runs comprehensions in line."""


def test_the_file_names_the_installed_transformers():
    content = json.loads(OUT.read_text(encoding="utf-8"))
    assert content["transformers"] == metadata.version("transformers")


@pytest.mark.parametrize(
    ("runtime", "kind", "attention"),
    [
        ("transformers", "llama", "sdpa"),
        ("transformers", "gpt2", "eager"),
        ("transformers", "bamba", "sdpa"),
        ("transformers", "qwen2_moe", "sdpa"),
        ("attnlab", "llama", "sdpa"),
        ("attnlab", "gemma2", "naive"),
        ("transformers", "t5", "sdpa"),
    ],
)
def test_counts_are_those_of_the_installed_classes(runtime, kind, attention):
    """After a change: `python -m tools.host_calls`."""
    for found, kept in zip(
        parts(runtime, kind, attention), known(runtime, kind, attention), strict=True
    ):
        assert (found.kernels, found.views) == (kept.kernels, kept.views)
        assert found.calls == pytest.approx(kept.calls, rel=PYTHONS)


@pytest.mark.parametrize(
    ("runtime", "name"),
    [
        ("attnlab", "paged"),
        ("attnlab", "static int4"),
        ("attnlab", "ring int8"),
        ("attnlab", "quantised int4"),
        ("transformers", "static"),
        ("transformers", "padded"),
    ],
)
def test_what_other_caches_ask_for_is_counted_too(runtime, name):
    for found, kept in zip(
        beyond(runtime, caches()[runtime][name]), more_of(runtime, name), strict=True
    ):
        assert (found.kernels, found.views) == (kept.kernels, kept.views)
        assert found.calls == pytest.approx(kept.calls, abs=5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("policy", ["full", "selective"])
def test_checkpointing_hands_saved_tensors_through_python(policy):
    plain, _ = trained("llama")
    forward, backward = trained("llama", policy)
    kept = known_trained("llama", selective=policy == "selective")
    assert forward - plain == pytest.approx(kept.forward, rel=PYTHONS)
    assert backward == pytest.approx(kept.backward, rel=PYTHONS)


def test_python_calls_are_counted():
    def inner():
        return 3

    def outer():
        return inner() + inner()

    assert python_calls(outer) == (3, 6)
