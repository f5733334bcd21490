"""docs/time.md's tables of whole models are what the committed records give today."""

import pytest

from tools import time_table
from tools.accuracy_table import committed


def test_the_tables_are_what_the_generator_gives():
    """After a change: `python -m tools.time_table`, and look at what became worse."""
    page = time_table.PAGE.read_text(encoding="utf-8")
    assert time_table.written(page, committed()) == page


def test_no_number_is_nearer_to_all_runs_than_the_best_one():
    seen = [2.0, 3.0, 5.0]
    tried = [2.0 + 0.01 * i for i in range(301)]
    nearest = min(sum(abs(c / m - 1.0) for m in seen) / 3 for c in tried)
    assert time_table.best_error(seen) == pytest.approx(nearest, abs=1e-9)
