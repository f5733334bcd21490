import itertools

import pytest
import torch

from attnlab.masks import Keys, Pattern, make_mask, visibility


def mask_of(T, S, window, **pattern):
    keys = Keys(torch.arange(S), in_order=True)
    return make_mask(keys.positions[S - T :], keys, Pattern(window=window, **pattern))


def test_a_mask_tensor_is_made_only_where_needed():
    assert mask_of(9, 9, None)[:2] == mask_of(9, 9, 9)[:2] == (None, True)
    assert mask_of(1, 9, None)[:2] == mask_of(1, 9, 9)[:2] == (None, False)
    assert mask_of(1, 1, 1)[:2] == (None, False)
    assert mask_of(9, 9, 8).visible.shape == (9, 9)
    assert mask_of(1, 9, 8).visible.tolist() == [[False] + [True] * 8]
    assert mask_of(2, 4, None).visible.tolist() == [[True, True, True, False], [True] * 4]


def test_a_mask_knows_where_queries_and_keys_stand():
    mask = mask_of(2, 4, None)
    assert mask.query_positions.tolist() == [2, 3]
    assert mask.key_positions.tolist() == [0, 1, 2, 3]


def sees(query, key, *, causal, window, chunked, prefix):
    """The rule in words, one pair at a time."""
    if key < 0:
        return False
    ahead = key > query
    if causal and ahead and key >= prefix:
        return False
    if window is None:
        return True
    if chunked:
        return key // window == query // window or (not causal and key // window > query // window)
    return query - window < key and (causal or key < query + window)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(
    ("causal", "window", "chunked", "prefix"),
    [
        (True, None, False, 0),
        (True, 3, False, 0),
        (True, 4, True, 0),
        (True, None, False, 5),
        (False, None, False, 0),
        (False, 3, False, 0),
    ],
)
def test_every_pair_of_query_and_key_follows_the_rule(causal, window, chunked, prefix, in_order):
    keys = list(range(11))
    if not in_order:
        keys = [7, 8, 9, 10, -1, 0, 5, 6, -1, 4]
    queries = [7, 8, 9, 10]
    table = visibility(
        torch.tensor(queries),
        Keys(torch.tensor(keys), in_order),
        Pattern(window=window, chunked=chunked, causal=causal),
        prefix_tokens=prefix,
    )
    for (i, q), (j, k) in itertools.product(enumerate(queries), enumerate(keys)):
        rule = dict(causal=causal, window=window, chunked=chunked, prefix=prefix)
        assert bool(table[i, j]) == sees(q, k, **rule), (q, k)


def test_sequences_that_differ_have_tables_of_their_own():
    queries, keys = torch.tensor([[2], [0]]), torch.tensor([[0, 1, 2], [0, -1, -1]])
    table = visibility(queries, Keys(keys, in_order=False))
    assert table.shape == (2, 1, 1, 3)
    assert table[:, 0, 0].tolist() == [[True] * 3, [True, False, False]]
