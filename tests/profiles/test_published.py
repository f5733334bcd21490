"""Memory that others measured: every row planned or refused, every miss with a sentence."""

import pytest

from profiles.published import EXPLAINED_FROM, load, published_rows, published_summary
from profiles.published_latency import latency_rows
from tools.published_table import ACCURACY, PAGE, page, summary_table, written


@pytest.fixture(scope="module")
def rows():
    return published_rows()


def test_every_row_says_where_it_is_from():
    assert all({"source", "licence", "gpu", "settings"} <= record.keys() for record in load())


def test_every_row_is_planned_or_says_why_not(rows):
    assert {row.row for row in rows} == set(range(len(load())))
    assert all(row.predicted is not None or row.why for row in rows)


def test_every_miss_has_a_sentence(rows):
    missed = [row for row in rows if abs(row.relative_error or 0) > EXPLAINED_FROM]
    assert missed
    assert all(row.why for row in missed)


def test_forwards_of_an_old_transformers_are_as_measured(rows):
    """48 runs of llamas on an A100, with what 4.35 held besides: max_memory_allocated."""
    allocated = [
        row
        for row in rows
        if row.source == "optimum-benchmark" and row.quantity == "peak_allocated_bytes"
    ]
    assert len(allocated) == 48
    assert all(abs(row.named_error) < 0.002 for row in allocated)


def test_finetuning_with_litgpt_is_as_measured(rows):
    """29 runs on an A100, LoRA, QLoRA, both LLaMA-Adapters: resource-tables.md, to 10 MB."""
    errors = [abs(row.relative_error) for row in rows if row.source == "litgpt"]
    assert len(errors) == 29
    assert max(errors) < 0.005
    assert sum(errors) / len(errors) < 0.0015


def test_sharded_steps_of_torchtitan_are_as_published(rows):
    """Reserved on 8 and 128 H100s; compiled layers with what they do not keep taken off."""
    ours = [row for row in rows if row.source == "torchtitan" and "H100" in row.gpu]
    assert len(ours) == 10
    uncompiled = [row for row in ours if "compiled" not in row.run]
    assert len(uncompiled) == 2
    assert all(abs(row.relative_error) < 0.04 for row in uncompiled)
    assert all(abs(row.named_error) < 0.03 for row in ours if row not in uncompiled)


def test_torchtune_is_as_measured_where_it_is_eager_in_effect(rows):
    """README.md, to 0.1 GiB: packed, eager; layers that keep their input alone, compiled."""
    eager, checkpointed = (
        row for row in rows if row.source == "torchtune" and row.predicted is not None
    )
    assert abs(eager.relative_error) < 0.006
    assert 0 < checkpointed.relative_error < 0.05


def test_the_summary_counts_every_row(rows):
    assert sum(s.n + s.unpredicted for s in published_summary(rows)) == len(rows)


def test_the_page_and_the_readme_are_what_is_planned_today(rows):
    assert PAGE.read_text(encoding="utf-8") == page(rows, latency_rows())
    text = ACCURACY.read_text(encoding="utf-8")
    assert written(text, summary_table(rows)) == text
