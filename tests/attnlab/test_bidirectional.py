"""Blocks that look both ways: what a query sees, whichever places are padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from attnlab.bidirectional import both_ways, run_both_ways
from attnlab.implementations import flex_with, naive, sdpa
from tests.attnlab.encoder_pairs import LENGTH, inputs_of, pair_of, theirs_of
from tests.properties import examples

CLOSE = dict(rtol=1e-4, atol=2e-5)
CPU = torch.device("cpu")
LEFT = torch.arange(LENGTH) >= torch.tensor([0, 8, 12])[:, None]
HOLES = torch.arange(LENGTH) % 3 != torch.tensor([3, 0, 1])[:, None]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("real", [LEFT, HOLES], ids=["left", "holes"])
def test_any_place_may_be_padding_as_in_transformers(family, real):
    theirs, ours = pair_of(family)
    ids = inputs_of(ours.model)
    rotations = ours._rotations(LENGTH, ids.device)
    made = run_both_ways(ours.layers, ours._embed(ids, None), real, rotations=rotations)
    made = made if ours.model.final_norm is None else ours.norm(made)
    expected, _ = theirs_of(theirs, ids, attention_mask=real.long())
    torch.testing.assert_close(made[real], expected[real], **CLOSE)
    assert made.isfinite().all()


@given(data=st.data())
@examples(60)
def test_real_tokens_see_the_real_ones_around_them_and_every_query_sees_one(data):
    T = data.draw(st.integers(1, 9))
    window = data.draw(st.none() | st.integers(1, 20))
    real = data.draw(st.lists(st.booleans(), min_size=T, max_size=T).filter(any))
    mask = both_ways(torch.tensor([real]), T, window, CPU)
    visible = mask.visible.expand(1, 1, T, T)[0, 0]
    assert visible.any(dim=-1).all()
    for query in range(T):
        if real[query]:
            near = [window is None or abs(key - query) <= window // 2 for key in range(T)]
            seen = [a and b for a, b in zip(near, real, strict=True)]
            assert visible[query].tolist() == seen


def test_no_mask_is_made_where_all_is_seen():
    assert both_ways(None, 9, None, CPU).visible is None
    assert both_ways(None, 9, 16, CPU).visible is None
    assert both_ways(None, 9, 15, CPU).visible is not None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("real", [None, LEFT, HOLES], ids=["all", "left", "holes"])
@pytest.mark.parametrize("window", [None, 6])
def test_all_implementations_read_these_masks_alike(real, window):
    generator = torch.Generator().manual_seed(4)
    qkv = torch.randn(3, 3, 2, LENGTH, 16, generator=generator).unbind()
    how = dict(scaling=0.25, mask=both_ways(real, LENGTH, window, CPU))
    expected = naive(*qkv, **how)
    torch.testing.assert_close(sdpa(*qkv, **how), expected, **CLOSE)
    made = flex_with(flex_attention, *qkv, **how, logit_softcap=None, sinks=None)
    torch.testing.assert_close(made, expected, **CLOSE)
