"""The few cases hold every pair."""

from itertools import combinations, product

import pytest

from tests.pairs import covering


@pytest.mark.parametrize("sizes", [(28, 6, 5), (3, 2, 2, 2), (1, 4), (14, 3, 3, 2), (62, 2, 2, 4)])
def test_every_value_meets_every_value_of_another_axis(sizes):
    rows = covering(sizes)
    for m, n in combinations(range(len(sizes)), 2):
        met = {(row[m], row[n]) for row in rows}
        assert met == set(product(range(sizes[m]), range(sizes[n])))
    assert len(rows) <= 1.5 * max(a * b for a, b in combinations(sizes, 2))
    assert len(set(rows)) == len(rows)
