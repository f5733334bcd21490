"""Functions in processes of their own: what comes back, and what becomes of those that die."""

import time

import pytest

from profiles.isolated import Ended, run_isolated
from tests.profiles import doomed


def test_a_process_begins_with_everything_imported_and_gives_its_answer():
    assert run_isolated(doomed.loaded, (), timeout_s=60) == Ended(answer=True)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (doomed.raises, "RuntimeError: first line"),
        (doomed.crashes, "the process died of SIGSEGV"),
        (doomed.leaves, "the process ended with exit code 3 and no answer"),
    ],
)
def test_a_process_that_fails_says_how(function, said):
    assert run_isolated(function, (), timeout_s=60) == Ended(problem=said)


def test_a_process_that_hangs_is_ended_in_time():
    started = time.monotonic()
    assert run_isolated(doomed.hangs, (), timeout_s=0.5).problem == "timed out after 0.5 s"
    assert time.monotonic() - started < 10
