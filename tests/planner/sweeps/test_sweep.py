"""Sweeps: every cell equals an estimate; refusals keep their rows; files hold what frames hold."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import planner
from planner import ConfigError
from planner.sweeps.views import fit_map, longest_contexts, pareto_front, top
from tests.properties import examples

RUNTIMES = ("vllm", "transformers", "attnlab", "llama.cpp")
MODELS = ("llama-3.1-8b", "gemma-2-9b", "mistral-7b-v0.1", "deepseek-v3", "mixtral-8x7b", "gpt2")


def estimate_of(row, **more):
    """The same by `estimate`; ConfigError where it refuses."""
    work = planner.Inference(
        batch=row.batch,
        prompt_tokens=row.context_tokens - row.output_tokens + 1,
        output_tokens=row.output_tokens,
        logits="last",
    )
    deploy = planner.Deployment(
        gpu=row.gpu,
        runtime=row.runtime,
        tensor_parallel=row.tensor_parallel,
        pipeline_parallel=row.pipeline_parallel,
        **more,
    )
    return planner.estimate(planner.load_model(row.model), work, deploy)


def assert_equals_estimate(row, **more):
    try:
        e = estimate_of(row, **more)
    except ConfigError:
        assert row.refused
        return
    assert not row.refused
    for name, value in e.memory.parts().items():
        if hasattr(row, name):
            assert getattr(row, name) == value, name
    assert (row.headroom_bytes, row.fits) == (e.headroom_bytes, e.fits)
    assert row.gpu_memory_bytes == e.gpu.memory_bytes
    pool = (row.kv_pool_bytes, row.kv_pool_tokens)
    assert tuple(None if pd.isna(n) else n for n in pool) == (e.kv_pool_bytes, e.kv_pool_tokens)
    if hasattr(row, "ttft_s"):
        assert row.ttft_s == pytest.approx(e.latency.ttft_s, rel=1e-12)
        expected = np.nan if e.latency.tpot_s is None else e.latency.tpot_s
        assert row.tpot_s == pytest.approx(expected, rel=1e-12, nan_ok=True)
        assert row.output_tokens_per_s == pytest.approx(e.latency.output_tokens_per_s, rel=1e-12)


@examples(40)
@given(
    model=st.sampled_from(MODELS),
    runtime=st.sampled_from(RUNTIMES),
    layout=st.sampled_from([(1, 1), (2, 1), (8, 1), (1, 2), (4, 2)]),
    batch=st.lists(st.integers(1, 2000), min_size=1, max_size=3, unique=True),
    context=st.lists(st.integers(1, 300_000), min_size=1, max_size=3, unique=True),
    output=st.sampled_from([1, 2, 3, 200]),
)
def test_each_cell_equals_the_estimate(model, runtime, layout, batch, context, output):
    tp, pp = layout
    table = planner.sweep(
        model,
        "h200",
        batch,
        context,
        output_tokens=output,
        runtime=runtime,
        tensor_parallel=tp,
        pipeline_parallel=pp,
        latency=True,
    )
    assert len(table) == len(batch) * len(context)
    for row in table.itertuples():
        assert_equals_estimate(row)


@pytest.mark.parametrize(
    ("model", "gpu", "runtime", "dtype"),
    [
        ("gemma-2-2b", "h200", "transformers", "fp32"),  # products of many matrices
        ("gemma-2-2b", "h200", "attnlab", None),
        ("qwen3-30b-a3b", "h200", "attnlab", None),  # experts that have a row each
        ("gemma-2-2b", "cpu", "attnlab", "fp32"),  # products of few rows
    ],
)
def test_a_cell_takes_as_long_beside_small_and_large_ones_as_alone(model, gpu, runtime, dtype):
    more = {"dtype": dtype}
    for output in (1, 2):
        table = planner.sweep(
            model, gpu, [1, 8], [2, 64, 4000], output_tokens=output, runtime=runtime, latency=True,
            **more,
        )  # fmt: skip
        for row in table.itertuples():
            assert_equals_estimate(row, **more)


@pytest.mark.parametrize("kv_dtype", ["fp8", "int4"])
def test_quantised_caches_of_transformers_are_estimated_cell_by_cell(kv_dtype):
    table = planner.sweep(
        "llama-3.1-8b", "h200", [1, 3], [128, 129], runtime="transformers", kv_dtype=kv_dtype
    )
    for row in table.itertuples():
        assert_equals_estimate(row, kv_dtype=kv_dtype)


def test_labels_are_categorical_and_columns_stand_in_their_order():
    table = planner.sweep("gpt2", ["h200", "t4"], [1], [64], kv_dtype=(None, "fp8"))
    assert list(table.columns[:11]) == [
        "model", "gpu", "runtime", "dtype", "kv_dtype", "tensor_parallel", "pipeline_parallel",
        "gpus", "batch", "context_tokens", "output_tokens",
    ]  # fmt: skip
    assert all(table[name].dtype == "category" for name in table.columns[:8])
    assert table.columns[-1] == "refused"
    assert not [c for c in table.columns if c.endswith("_bytes") and table[c].dtype != "Int64"]
    assert list(table["kv_dtype"]) == ["fp32", "fp8"] * 2


def test_what_is_refused_keeps_its_rows_and_says_why():
    table = planner.sweep(
        ["gpt2", "bert-base-uncased"] if "bert-base-uncased" in planner.catalogue() else ["gpt2"],
        "h200",
        [1],
        [4, 64, 2000],
        output_tokens=8,
        runtime=("vllm", "attnlab"),
        tensor_parallel=(1, 5),
    )
    reasons = set(table["refused"]) - {""}
    assert "context_tokens reaches beyond 1024 of gpt2" in reasons
    assert "context_tokens is less than output_tokens: no prompt is left" in reasons
    assert any("tensor_parallel=5" in reason for reason in reasons)
    unknown = table[table["refused"] != ""]
    assert unknown[["total_bytes", "fits"]].isna().all().all()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch": []}, "batch is empty"),
        ({"batch": [1, 0]}, "batch=0 is not allowed"),
        ({"batch": [1.5]}, "batch=1.5 is not allowed"),
        ({"batch": [True]}, "batch=True is not allowed"),
        ({"context_tokens": [2**31 + 1]}, "context_tokens=2147483649 is not allowed"),
        ({"models": []}, "models is empty"),
        ({"models": ["no-such"]}, "no-such"),
        ({"gpus": []}, "gpus is empty"),
        ({"runtime": []}, "runtime is empty"),
        ({"output_tokens": 0}, "output_tokens=0"),
        ({"gpus": "h2000"}, "h2000"),
        ({"runtime": "sglang"}, "sglang"),
        ({"kv_dtype": ["int3x"]}, "kv_dtype='int3x' is not allowed"),
        ({"tensor_parallel": [0]}, "tensor_parallel=0 is not allowed"),
        (
            {"to": "table.txt"},
            "to='table.txt' is not allowed: a name that ends in .csv or .parquet",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(given, said):
    asked = {"models": "gpt2", "gpus": "h200", "batch": [1], "context_tokens": [8], **given}
    with pytest.raises(ConfigError) as refused:
        planner.sweep(**asked)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_file_holds_what_the_frame_holds(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr("planner.sweeps.cells.CHUNK_CELLS", 5)  # several blocks
    asked = ("llama-3.1-8b", ["h200", "rtx-4090"], [1, 7, 64], [100, 5000])
    more = {"runtime": ("vllm", "attnlab"), "tensor_parallel": (1, 2), "latency": True}
    told = []
    path = planner.sweep(
        *asked, **more, to=tmp_path / f"grid{suffix}", on_progress=lambda *n: told.append(n)
    )
    read = pd.read_csv if suffix == ".csv" else pd.read_parquet
    found, frame = read(path), planner.sweep(*asked, **more)
    assert list(found.columns) == list(frame.columns)
    for name in frame.columns:
        if frame[name].dtype in (float, "Int64", "int64"):
            pair = (table[name].astype("Float64").astype(float) for table in (frame, found))
            np.testing.assert_allclose(*pair, rtol=1e-12)
        else:
            ours, theirs = (
                table[name].astype(object).where(table[name].notna(), "").astype(str)
                for table in (frame, found)
            )
            assert list(ours) == list(theirs), name
    assert told[-1] == (len(frame), len(frame))


def test_names_cannot_run_as_formulas(tmp_path):
    config = planner.load_model("gpt2").config
    from dataclasses import replace

    model = replace(planner.read_config(config), name="=cmd()")
    path = planner.sweep(model, "h200", [1], [8], to=tmp_path / "grid.csv")
    assert path.read_text().splitlines()[1].startswith("'=cmd()")


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        planner.sweep("gpt2", "h200", [1], [8], to=tmp_path / "no" / "grid.csv")


def test_a_map_of_what_fits():
    table = planner.sweep("llama-3.1-8b", "rtx-4090", [1, 2, 4], [1000, 30_000], runtime="attnlab")
    shown = fit_map(table)
    assert shown.shape == (3, 2)
    assert (shown.loc[1] > shown.loc[4]).all()
    with pytest.raises(ConfigError, match="gpu has several values"):
        fit_map(planner.sweep("gpt2", ["h200", "t4"], [1], [8]))
    with pytest.raises(ConfigError, match="column 'x' is not in the table"):
        fit_map(table, "x")


def test_longest_contexts_of_a_table_are_those_that_fit_with_all_shorter_ones():
    contexts = list(range(1000, 131_000, 5000))
    table = planner.sweep("llama-3.1-8b", "rtx-4090", [1, 4], contexts, runtime="attnlab")
    found = longest_contexts(table).set_index("batch")["longest_context_tokens"]
    model = planner.load_model("llama-3.1-8b")
    for batch in (1, 4):
        work = planner.Inference(batch=batch, prompt_tokens=8, logits="last")
        deploy = planner.Deployment(gpu="rtx-4090", runtime="attnlab")
        most = planner.max_context_tokens(model, work, deploy)
        assert found[batch] == max(c for c in contexts if c <= most)


def test_the_front_has_no_row_that_another_beats():
    table = planner.sweep(
        "llama-3.1-8b", "h100-80gb", [1, 8, 64, 256], [4096], tensor_parallel=(1, 2, 4),
        latency=True, output_tokens=64,
    )  # fmt: skip
    front = pareto_front(table, minimise=("gpus", "tpot_s"), maximise=("output_tokens_per_s",))
    assert 1 < len(front) <= len(table)
    costs = np.column_stack(
        [
            front["gpus"].astype(int),
            front["tpot_s"],
            -front["output_tokens_per_s"],
        ]
    )
    for mine in costs:
        assert not any((o <= mine).all() and (o < mine).any() for o in costs)
    best = top(table, 2, by="output_tokens_per_s")
    assert (
        list(best["output_tokens_per_s"]) == sorted(table["output_tokens_per_s"], reverse=True)[:2]
    )
