"""Runs of host ops, whose host is faster in one second than in the next, are put at one speed."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from profiles.host_costs import joined_costs
from profiles.microbench.op_record import load

RECORDS = Path("profiles/data/microbench/h200.jsonl")


def timed(seconds, *, at_s):
    """Host ops, a tenth of a second apart."""
    made = []
    any_op = next(r for r in load(RECORDS).ops if r.family == "host")
    for place, (op, cost) in enumerate(seconds.items()):
        when = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=at_s + place / 10)
        made.append(replace(any_op, op=op, samples_s=(cost,), created_utc=when.isoformat()))
    return made


def test_one_run_is_taken_as_it_is():
    assert joined_costs(timed({"add": 4.0, "sum": 6.0}, at_s=0)) == {"add": 4.0, "sum": 6.0}


def test_what_a_faster_host_ran_later_is_put_at_the_speed_of_the_first():
    first = timed({"add": 4.0, "sum": 6.0}, at_s=0)
    later = timed({"add": 2.0, "sum": 3.0, "gather": 2.5}, at_s=3600)
    costs = joined_costs([*first, *later])
    assert costs == pytest.approx({"add": 4.0, "sum": 6.0, "gather": 5.0})


def test_an_op_that_two_runs_timed_is_the_mean_of_both():
    first = timed({"add": 4.0, "sum": 6.0, "cat": 5.0}, at_s=0)
    later = timed({"add": 4.0, "sum": 6.0, "cat": 5.0 * 1.21}, at_s=3600)
    assert joined_costs([*first, *later])["cat"] == pytest.approx(5.0 * 1.1)


def test_a_gather_costs_more_than_an_addition_whenever_the_two_were_timed():
    """A run that grew faster has it at 7.7 µs, beside an addition of 8.9 at its start."""
    costs = joined_costs(load(RECORDS).ops)
    assert costs["gather"] > costs["add"]
    assert costs["linear_bias"] > costs["linear"]
