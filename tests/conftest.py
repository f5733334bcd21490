"""One thread for each worker, and runs that repeat: a suite that turns red has met a change."""

from __future__ import annotations

import gc
import os
import sys

import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers

# Tiny models gain nothing from more threads, and two workers would fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
# Times come from the catalogue alone, whatever a developer has calibrated here.
os.environ["PLANNER_CALIBRATION"] = ""
# Some virtual machines announce AMX and then refuse it: oneDNN's bf16 products die there of an
# illegal instruction. Without it the same tensors are made.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
# A look for garbage through all of torch, transformers and the collected tests takes half a second.
gc.set_threshold(20_000, 10, 10)

# PLANNER_FUZZ=10 draws other examples in every run, and ten times as many (tests/properties.py).
FUZZ = int(os.environ.get("PLANNER_FUZZ", "0"))
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile(
    "fuzz", max_examples=100 * FUZZ or 100, database=None, deadline=None, print_blob=True
)
settings.load_profile("fuzz" if FUZZ else "repeatable")
if not FUZZ:
    # Hypothesis mixes in constants of those modules of ours that are loaded by then: which
    # examples a test draws would hang on the tests before it.
    providers._get_local_constants = lambda: providers._local_constants


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported and collected stays: garbage is looked for in what tests make."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Random tensors of a test are its own, whichever tests ran before it."""
    if not FUZZ and (torch := sys.modules.get("torch")) is not None:
        torch.default_generator.manual_seed(0)  # torch.manual_seed formats its stack
