"""CUDA's split reductions: the scratch that an H200's allocator was asked for."""

import pytest

from planner.autograd.reduction_scratch import column_sum_scratch
from planner.program import Dims, T, evaluate

H200 = 132


def asked(tokens, outputs, multiprocessors=H200):
    dims = Dims(batch=1, tokens=tokens, context=tokens)
    scratch = column_sum_scratch((T,), outputs, multiprocessors)
    return [itemsize * evaluate(shape, dims) for shape, itemsize in scratch]


@pytest.mark.parametrize(
    ("tokens", "outputs", "expected"),
    [
        (4096, 4096, [134_217_728, 128]),  # llama-3.1-8b, a norm's weight in bf16
        (2048, 2048, [33_554_432, 64]),  # llama-3.2-1b
        (1024, 2304, [18_874_368, 72]),  # gemma-2-2b, in float32
        (4096, 3072, [100_663_296, 96]),  # gpt2, a bias of the feed-forward
        (4096, 768, [25_165_824, 24]),
    ],
)
def test_the_scratch_is_what_a_history_has(tokens, outputs, expected):
    """profiles/data/histories: allocations beside the gradients of biases and norms."""
    assert asked(tokens, outputs) == expected


def test_few_rows_are_summed_by_one_block_each():
    assert asked(512, 4096) == [0, 0]


def test_nothing_is_known_without_a_device():
    assert asked(4096, 4096, multiprocessors=0) == []


def test_narrow_sums_are_left_out():
    assert asked(4096, 16) == []
