"""docs/architectures.md says what these comparisons find."""

from __future__ import annotations

import pytest

from tests.coverage import TYPES, row, written


@pytest.mark.parametrize("model_type", TYPES)
def test_the_table_says_what_is_found(model_type):
    stale = "run `python -m tests.coverage`"
    assert written().get(model_type) == row(model_type), stale


def test_the_table_has_no_other_types():
    assert sorted(written()) == TYPES
