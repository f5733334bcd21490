import torch

from attnlab.masks import make_mask


def mask_of(T, S, window):
    positions = torch.arange(S)
    return make_mask(positions[S - T :], positions, window=window)


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
