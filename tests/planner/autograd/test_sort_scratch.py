"""Scratch of kernels that sort, against what an H200's allocator was asked for."""

from __future__ import annotations

import pytest

from planner.allocator import Alloc
from planner.autograd.sort_scratch import embedding_scratch, radix_sort_bytes, sort_scratch
from planner.program import B, Dims, T, evaluate
from profiles.allocator_replay import read_recording
from profiles.records import DATA


def asked_for(name):
    (path,) = (DATA / "histories").glob(f"{name}*")
    return [event.size_bytes for event in read_recording(path).events if isinstance(event, Alloc)]


def sizes(scratch, dims):
    return [int(evaluate(shape, dims)) * itemsize for shape, itemsize in scratch]


@pytest.mark.parametrize(
    ("history", "batch", "tokens", "rows", "width"),
    [
        ("llama-3-1-8b-transformers-training", 1, 4096, 128_256, 4096),
        (
            "gpt2-transformers-training-8---512-adamw-foreach--checkpointing-none",
            8,
            512,
            50_257,
            768,
        ),
    ],
)
def test_the_gradient_of_an_embedding_sorts_its_ids(history, batch, tokens, rows, width):
    seen = asked_for(history)
    found = sizes(
        embedding_scratch((B, T), rows, width), Dims(batch=batch, tokens=tokens, context=tokens)
    )
    sums = next(i for i, size in enumerate(seen) if size == found[-1])
    around = seen[sums - 14 : sums]  # cub's own are among them
    assert all(around.count(size) >= found[:-1].count(size) for size in found[:-1])
    assert radix_sort_bytes(batch * tokens) in around


def test_few_ids_are_not_sorted():
    assert (
        sum(sizes(embedding_scratch((B, T), 100, 8), Dims(batch=3, tokens=1024, context=1024))) == 0
    )


def test_more_ids_than_rows_have_as_many_sums_as_rows_and_a_tenth():
    dims = Dims(batch=1, tokens=5000, context=5000)
    assert sizes(embedding_scratch((B, T), 30, 8), dims)[-1] == (500 + 30) * 8 * 4


@pytest.mark.parametrize(("rows", "radix"), [(4096, 0), (4097, radix_sort_bytes(4097))])
def test_a_short_sort_is_done_in_place(rows, radix):
    assert sizes(sort_scratch((T,)), Dims(batch=1, tokens=rows, context=rows)) == [8 * rows, radix]


@pytest.mark.parametrize(("history", "experts"), [("deepseek-v2-lite", 64), ("qwen1-5-moe", 60)])
def test_grouped_products_ask_for_arguments_and_tensor_maps(history, experts):
    """60 bytes a group, 512 a multiprocessor, of which an H200 has 132; and the sum before them."""
    seen = asked_for(history)
    pairs = sum(seen[i : i + 2] == [60 * experts, 512 * 132] for i in range(len(seen)))
    assert pairs > 100
    assert 1023 in seen
