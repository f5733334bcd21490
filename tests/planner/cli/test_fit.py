"""fit, sweep and diff from a shell: answers, JSON, files, bad input in one line."""

import json

import pandas as pd
import pytest

import planner
from planner.cli.commands import main


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def test_fit_says_how_long_a_sequence_can_be_trained(run):
    training = ("--train", "--method", "lora", "--checkpointing", "full")
    code, out, _ = run("fit", "qwen2.5-7b", "--gpu", "rtx-4090", *training, "--json")
    work = planner.Training(batch=1, sequence_tokens=1024, method="lora", checkpointing="full")
    model, deploy = planner.load_model("qwen2.5-7b"), planner.Deployment(gpu="rtx-4090")
    longest = planner.max_context_tokens(model, work, deploy)
    assert (code, json.loads(out)["max_context_tokens"]) == (0, longest)


FIT = ("fit", "llama-3.1-8b", "--gpu", "rtx-4090", "--runtime", "vllm", "--batch", "4")


def test_fit_says_what_ends_it_and_what_would_relax_it(run):
    code, out, _ = run(*FIT, "--prompt", "1000", "--output", "300", "--traffic", "lognormal:0.8")
    assert code == 0
    assert "ends at: the KV pool of" in out
    assert "fp8 KV: " in out
    assert "requests at once, lognormal" in out
    assert "fewest GPUs for batch 4, 1000 prompt + 300 output tokens: 1" in out


def test_fit_answers_in_json(run):
    code, out, _ = run(*FIT, "--json", "--traffic", "fixed")
    answer = json.loads(out)
    assert code == 0
    model = planner.load_model("llama-3.1-8b")
    work = planner.Inference(batch=4, prompt_tokens=1024)
    deploy = planner.Deployment(gpu="rtx-4090", runtime="vllm")
    assert answer["max_context_tokens"] == planner.max_context_tokens(model, work, deploy)
    assert answer["max_batch"] == planner.max_batch(model, work, deploy)
    assert answer["min_gpus"] == 1
    assert answer["max_concurrent_requests"] == answer["answers"]["requests"]["value"]


def test_fit_of_a_trace_and_of_one_that_is_none(run, tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("prompt_tokens,output_tokens\n100,50\n2000,10\n")
    assert "2 requests of trace.csv" in run(*FIT, "--traffic", path)[1]
    code, _, err = run(*FIT, "--traffic", tmp_path / "none.csv")
    assert (code, err.count("\n")) == (2, 1)
    code, _, err = run(*FIT, "--traffic", "lognormal:x")
    assert code == 2
    assert "lognormal:SIGMA" in err


def test_sweep_prints_writes_and_streams(run, tmp_path):
    asked = ("sweep", "llama-3.1-8b", "gpt2", "--gpu", "h200", "--batch", "1,4:8:2")
    code, out, _ = run(*asked, "--context", "512:1024:512", "--json")
    rows = json.loads(out)["rows"]
    assert (code, len(rows)) == (0, 2 * 4 * 2)
    assert {row["batch"] for row in rows} == {1, 4, 6, 8}
    assert all(row["refused"] == "" for row in rows)
    assert "16 estimates" in run(*asked, "--context", "512:1024:512")[1]
    run(*asked, "--context", "512,2048", "--csv", tmp_path / "a.csv")
    code, out, _ = run(*asked, "--context", "512,2048", "--to", tmp_path / "b.csv")
    assert (code, out.strip()) == (0, f"{tmp_path / 'b.csv'} written")
    first, second = (pd.read_csv(tmp_path / name) for name in ("a.csv", "b.csv"))
    pd.testing.assert_frame_equal(first, second)
    assert "reaches beyond 1024 of gpt2" in "".join(first["refused"].dropna())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--batch", "1:x"), "batch='1:x' is not understood"),
        (("--batch", "1:2:3:4"), "is not understood"),
        (("--batch", "5:1"), "batch='5:1' is not allowed"),
        (("--context", "1:99999999"), "at most 100,000 numbers"),
        (("--batch", "0"), "batch=0 is not allowed"),
        (("--runtime", "sglang"), "sglang"),
        (("--to", "x.txt"), "a name that ends in .csv or .parquet"),
    ],
)
def test_a_bad_sweep_is_one_line(run, more, said):
    code, _, err = run("sweep", "gpt2", "--gpu", "h200", *more)
    assert (code, err.count("\n")) == (2, 1)
    assert said in err


def test_diff_attributes_a_change(run, tmp_path):
    asked = ("diff", "llama-3.1-8b", "--gpu", "rtx-4090", "--runtime", "vllm", "--batch", "8")
    code, out, _ = run(*asked, "--change", "kv_dtype=fp8", "--json")
    rows = {(r["component"], r["item"]): r["change_bytes"] for r in json.loads(out)["rows"]}
    assert code == 0
    assert rows["kv_cache", "in all"] == rows["total", "in all"] < 0
    code, out, _ = run(*asked, "--change", "gpu=h200", "--csv", tmp_path / "diff.csv")
    assert "after:  Fits" in out
    assert (tmp_path / "diff.csv").read_text().startswith("component,item,before_bytes")


@pytest.mark.parametrize("change", ["foo=1", "gpu", "tensor_parallel=x", "cache=ring", ""])
def test_a_bad_change_is_one_line(run, change):
    code, _, err = run("diff", "gpt2", "--gpu", "h200", "--change", change)
    assert (code, err.count("\n")) == (2, 1)


def test_gpus_lists_the_fewest_of_each_cheapest_first(run, tmp_path):
    asked = ("gpus", "llama-3.1-70b", "--gpu", "h100-80gb", "--gpu", "rtx-4090", "--gpu", "t4")
    code, out, _ = run(*asked, "--price", "h100-80gb=3", "--price", "rtx-4090=0.4", "--json")
    rows = json.loads(out)["rows"]
    assert code == 0
    assert {row["gpu"] for row in rows} == {"h100-80gb", "rtx-4090", "t4"}
    found = {row["gpu"]: row["gpus"] for row in rows}
    assert found["h100-80gb"] == 2
    code, out, _ = run(*asked, "--csv", tmp_path / "gpus.csv")
    assert "h100-80gb" in out
    assert (tmp_path / "gpus.csv").read_text().startswith("gpu,gpus,tensor_parallel")
    assert run(*asked[:2], "--gpu", "t4", "--runtime", "transformers")[0] == 1


@pytest.mark.parametrize("price", ["h200", "h200=x", "nonsense=1", "h200=-2"])
def test_a_bad_price_is_one_line(run, price):
    code, _, err = run("gpus", "gpt2", "--price", price)
    assert (code, err.count("\n")) == (2, 1)
