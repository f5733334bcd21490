"""Sizes and strides against torch's own tensors, drawn at random."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from planner.autograd import layouts
from tests.properties import examples


@st.composite
def tensors(draw, ranks=(1, 4)):
    """A tensor of small sizes, its dimensions in any order, some of them cut."""
    rank = draw(st.integers(*ranks))
    sizes = draw(st.lists(st.sampled_from((1, 1, 2, 3, 4, 5)), min_size=rank, max_size=rank))
    x = torch.empty(sizes).permute(draw(st.permutations(range(rank))))
    for dim in range(rank):
        if x.shape[dim] > 1 and draw(st.integers(0, 4)) == 0:
            x = x.narrow(dim, 0, draw(st.integers(1, x.shape[dim] - 1)))
    return x


def lies(x):
    return tuple(x.shape), x.stride()


@examples(200)
@given(x=tensors())
def test_what_lies_row_major_without_gaps(x):
    sizes, strides = lies(x)
    assert layouts.is_contiguous(sizes, strides) == x.is_contiguous()
    dense = torch._prims_common.is_non_overlapping_and_dense_or_false(x)
    assert layouts.is_dense(sizes, strides) == dense


@examples(400)
@given(x=tensors(), data=st.data())
def test_what_can_be_a_view(x, data):
    sizes = list(x.shape)
    dim = data.draw(st.integers(0, len(sizes) - 1))
    how = data.draw(st.sampled_from(("merge", "split", "one more")))
    if how == "merge":
        sizes[dim : dim + 2] = [torch.Size(sizes[dim : dim + 2]).numel()]
    elif how == "split" and sizes[dim] % 2 == 0:
        sizes[dim : dim + 1] = [2, sizes[dim] // 2]
    else:
        sizes.insert(dim, 1)
    try:
        expected = x.view(sizes).stride()
    except RuntimeError:
        expected = None
    assert layouts.view(*lies(x), tuple(sizes)) == expected


@examples(400)
@given(x=tensors(), y=tensors())
def test_how_results_lie(x, y):
    assert layouts.preserved(*lies(x)) == x.clone().stride()
    assert layouts.elementwise(lies(x)[0], [lies(x)]) == x.neg().stride()
    try:
        out = x + y
    except RuntimeError:
        return
    assert layouts.elementwise(tuple(out.shape), [lies(x), lies(y)]) == out.stride()


@examples(200)
@given(x=tensors(ranks=(4, 4)))
def test_what_is_joined_as_images_are(x):
    out = torch.cat([x, x], dim=-1)
    sizes = tuple(out.shape)
    images = layouts.is_channels_last(*lies(x))
    expected = layouts.channels_last(sizes) if images else layouts.contiguous(sizes)
    assert expected == out.stride()


@pytest.mark.parametrize(
    ("sizes", "own", "laid", "found"),
    [
        ((64, 32), (64, 32), (32, 1), ""),
        ((64, 32), (64, 1), (1, 1), ""),  # a column, repeated along the rows
        ((512, 64), (512, 64), (1, 512), "across"),  # 64 sectors, of which a block uses four floats
        ((64, 256), (64, 256), (1, 64), "far"),  # 256 sectors, one float of each
        ((64, 256), (1, 256), (64, 64), "across"),  # repeated: read again
        ((64, 256), (64, 256), (512, 2), ""),  # every second: sectors are shared
    ],
)
def test_what_is_read_across_what_is_written_is_told(sizes, own, laid, found):
    """CUDALoops.cuh: a block of threads writes 256 neighbours; sectors are of 32 bytes."""
    assert layouts.reach(sizes, layouts.contiguous(sizes), [(own, laid, 4)]) == found
