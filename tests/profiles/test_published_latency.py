"""Times that others measured: every row planned as its source says or refused, misses explained."""

import tomllib
from pathlib import Path

import pytest

from planner.errors import ConfigError
from profiles import published_sources
from profiles.published_engines import plan_of
from profiles.published_latency import (
    EXPLAINED_FROM,
    latency_rows,
    latency_summary,
    load,
    published,
    rows_of,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
    return latency_rows()


def the(**conditions):
    """The one record that says so."""
    found = [r for r in load() if all(r.get(k) == v for k, v in conditions.items())]
    assert len(found) == 1
    return found[0]


def test_every_record_says_where_it_is_from_and_how_it_ran():
    conditions = {"source", "licence", "engine", "model", "gpu", "gpus", "dtype", "batch", "prompt",
                  "output", "kind", "notes"}  # fmt: skip
    for record in load():
        assert conditions <= record.keys()
        assert record["licence"] in ("Apache-2.0", "BSD-3-Clause")
        assert len(record["source"].partition("@")[2].partition(":")[0]) == 40
        assert published(record)


def test_every_record_is_planned_or_says_why_not(rows):
    assert {row.row for row in rows} == set(range(len(load())))
    assert all(row.planned_as if row.predicted is not None else row.why for row in rows)
    refused = [row.why for row in rows if row.predicted is None]
    said = (
        "reaches beyond max_position_embeddings=2048",
        "float8 is not",
        "128: times not planned",
    )
    assert [sum(words in why for why in refused) for words in said] == [1, 2, 2]
    assert len(refused) == 5


def test_every_miss_has_a_sentence_and_nothing_else_has(rows):
    planned = [row for row in rows if row.relative_error is not None]
    missed = [row for row in planned if abs(row.relative_error) > EXPLAINED_FROM]
    assert missed
    assert all(row.why for row in missed)
    assert not any(row.why for row in planned if row not in missed)


def test_a_decoding_time_is_what_its_source_prints_as_one():
    """decode.latency(s) of full_report.csv, rows 0 to 6: to three digits, over 511 steps."""
    printed = {1: 13.2, 4: 13.7, 32: 26.4, 64: 44.2, 8: 13.9, 16: 17.1, 2: 13.4}
    for record in load()[:7]:
        assert 511 * published(record)["tpot_s"] == pytest.approx(
            printed[record["batch"]], rel=5e-3
        )


def test_a_rate_counts_the_tokens_that_its_source_counts():
    """vllm bench throughput: all tokens; gpt-fast: those generated."""
    prefill = the(gpu="B200", dtype="bf16", prompt=4096)
    (row,) = rows_of(0, prefill)
    plan = plan_of(prefill)
    assert (plan.deploy.runtime, plan.deploy.max_batched_tokens) == ("vllm", 16384)
    assert row.predicted > 32 * 32 * 10  # output tokens alone are one in 129
    (row,) = rows_of(0, the(model="Llama-2-7b-chat", dtype="bf16", gpus=1, prompt=5))
    assert abs(row.relative_error) < 0.03


@pytest.mark.parametrize(
    ("conditions", "gpu", "layout", "dtypes"),
    [
        ({"model": "LLaMA 70B", "gpu": "H100-SXM-80GB", "batch": 512},
         "h100-80gb", 4, ("fp16", "fp8", "fp8")),
        ({"model": "LLaMA 70B", "gpu": "A100-80GB", "batch": 256},
         "a100-80gb", 4, ("fp16", None, None)),
        ({"model": "Llama-3.1-405B", "dtype": "int8 weight-only"},
         "a100-80gb", 8, ("bf16", "int8", None)),
        ({"model": "Llama-2-70b-chat", "dtype": "int4 weight-only, groups of 32", "gpus": 8},
         "a100-80gb", 8, ("bf16", "int4", None)),
    ],
)  # fmt: skip
def test_a_run_is_planned_on_its_gpus_in_its_dtypes(conditions, gpu, layout, dtypes):
    record = the(**conditions)
    plan = plan_of(record)
    deploy = plan.deploy
    assert (deploy.gpu, deploy.tensor_parallel) == (gpu, layout)
    assert (deploy.dtype, deploy.weight_dtype, deploy.kv_dtype) == dtypes
    assert plan.work.batch == record["batch"]


def test_the_limit_that_is_not_planned_is_said():
    limited = plan_of(the(model="Llama-3.1-405B", dtype="int8 weight-only"))
    assert "at full power" in limited.planned_as


def test_the_summary_counts_every_row(rows):
    assert sum(s.n + s.unpredicted for s in latency_summary(rows)) == len(rows)


def test_a_wheel_has_the_rows_and_an_installation_without_them_says_so(monkeypatch, tmp_path):
    kept = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "data/published/*.jsonl" in kept["package-data"]["profiles"]
    monkeypatch.setattr(published_sources, "FOLDER", tmp_path)
    with pytest.raises(ConfigError, match=r"latency\.jsonl is missing"):
        load()
