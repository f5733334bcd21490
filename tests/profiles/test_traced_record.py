"""What a record measured on the CPU, traced on fake tensors: the same bytes."""

import pytest

import planner
from planner import ConfigError
from profiles.compare import compare, measured
from profiles.runner import profile
from profiles.traced_record import traced
from tests.planner.configs import TINY


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Every phase of a small model in both runtimes, measured here."""
    out = tmp_path_factory.mktemp("records") / "records.jsonl"
    model = planner.read_config(TINY["llama"])
    return [
        record
        for runtime in ("attnlab", "transformers")
        for record in profile(
            model, out=out, device="cpu", runtime=runtime, batch=2, prompt_tokens=40,
            output_tokens=6, repeats=1, warmup=0,
        )
    ]  # fmt: skip


def test_weights_cache_and_peaks_equal_what_was_measured(records):
    for record in records:
        seen = measured(record)
        assert traced(record) == {name: seen[name] for name in traced(record)}


def test_a_comparison_has_them_beside_the_others_when_asked(records):
    assert all(row.traced is None for row in compare(records))
    rows = {(r.record, r.quantity): r for r in compare(records, traced=True)}
    for row in rows.values():
        if row.quantity.endswith("_s"):
            assert row.traced is None
        else:
            assert row.traced == row.measured == row.predicted


def test_what_cannot_be_traced_is_told_and_keeps_its_rows(records, monkeypatch):
    def refuse(record):
        raise ConfigError("a forward of llama: needs values")

    monkeypatch.setattr("profiles.traced_record.traced", refuse)
    told = []
    rows = compare(records[:1], traced=True, on_problem=told.append)
    assert rows
    assert all(row.traced is None for row in rows)
    assert told == [
        f"record {records[0].id} (llama, prefill) is not traced: a forward of llama: needs values"
    ]
