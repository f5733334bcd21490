"""The shell's view: exit codes 0, 1, 2, one line for what is wrong, JSON and CSV."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from planner.cli.commands import main
from tests.planner.configs import TINY


@pytest.fixture
def run(capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def test_estimate_prints_every_part_and_the_verdict(run):
    code, out, err = run("estimate", "llama-3.1-8b", "--gpu", "h200", "--prompt", "4096")
    assert (code, err) == (0, "")
    for word in ("Fits", "weights", "kv_cache", "activations", "overhead", "peak: logits"):
        assert word in out


def test_what_does_not_fit_exits_with_1(run):
    code, out, _ = run("estimate", "llama-3.1-70b", "--gpu", "t4")
    assert code == 1
    assert "Does not fit" in out


def test_json_and_csv_carry_the_same_total(run, tmp_path):
    path = tmp_path / "e.csv"
    arguments = ("estimate", "gpt2", "--gpu", "t4", "--prompt", "64", "--json", "--csv", str(path))
    code, out, _ = run(*arguments)
    answer = json.loads(out)
    assert code == 0
    assert pd.read_csv(path)["bytes"].sum() == answer["memory"]["total_bytes"]
    assert sum(row["size_bytes"] for row in answer["rows"]) == answer["memory"]["total_bytes"]


def test_params_lists_every_tensor(run):
    code, out, _ = run("params", "gpt2", "--json")
    answer = json.loads(out)
    assert code == 0
    assert sum(row["count"] for row in answer["parameters"]) == answer["parameter_count"]
    assert run("params", "gpt2")[0] == 0


def test_a_type_without_a_reader_can_be_traced(run, tmp_path):
    path = tmp_path / "xglm" / "config.json"
    path.parent.mkdir()
    path.write_text('{"model_type": "xglm", "num_layers": 1, "d_model": 32, "ffn_dim": 8}')
    code, _, err = run("params", str(path))
    assert code == 2
    assert "--traced" in err
    code, out, _ = run("params", str(path), "--traced", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["traced"]
    assert len(answer["parameters"]) > 10


def test_fit_answers_the_inverse_questions(run):
    code, out, _ = run("fit", "llama-3.1-8b", "--gpu", "rtx-4090", "--json")
    answer = json.loads(out)
    assert code == 0
    assert answer["max_context_tokens"] > 1024
    assert answer["max_batch"] >= 1
    assert run("fit", "llama-3.1-70b", "--gpu", "rtx-4090")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("estimate", "llama-9", "--gpu", "h200"), "model='llama-9'"),
        (("estimate", "gpt2", "--gpu", "h201"), "gpu='h201'"),
        (("estimate", "gpt2", "--gpu", "t4", "--batch", "-1"), "batch=-1"),
        (("estimate", "gpt2", "--gpu", "t4", "--batch", "many"), "--batch"),
        (("estimate", "gpt2", "--gpu", "t4", "--prompt", "5000"), "max_position_embeddings=1024"),
        (("estimate", "gpt2", "--gpu", "t4", "--logits", "some"), "logits='some'"),
        (("estimate", "gpt2"), "--gpu"),
        (("estimate", "gpt2", "--gpu", "t4", "--colour"), "--colour"),
        (("dance",), "dance"),
        (("calibrate", "--gpu", "h201", "--budget", "8m"), "gpu='h201'"),
        (("compare", "/tmp/absent.jsonl"), "/tmp/absent.jsonl is not a record file"),
        (("profile", "gpt2", "--device", "cpu", "--out", "/proc/x/r.jsonl"), "cannot be written"),
        (("profile", "gpt2", "--device", "tpu"), "device='tpu'"),
        (("profile", "gpt2", "--device", "cpu", "--batch", "0"), "batch=0"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_broken_files_are_one_line_and_exit_2(run, tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "llama"')
    code, _, err = run("estimate", str(path), "--gpu", "h200")
    assert code == 2
    assert "is not JSON" in err


def test_a_profile_is_compared_and_kept(run, tmp_path):
    config, out = tmp_path / "tiny" / "config.json", tmp_path / "records.jsonl"
    config.parent.mkdir()
    config.write_text(json.dumps({**TINY["llama"], "dtype": "float32"}))
    arguments = ["profile", str(config), "--batch", "2", "--prompt", "16", "--output", "4"]
    code, text, err = run(
        *arguments, "--device", "cpu", "--repeats", "1", "--out", str(out), "--json"
    )
    assert (code, err) == (0, "")
    rows = {
        (row["phase"], row["quantity"]): row["relative_error"] for row in json.loads(text)["rows"]
    }
    for quantity in ("weights_bytes", "kv_cache_bytes", "peak_live_bytes"):
        assert rows["prefill", quantity] == rows["generation", quantity] == 0

    out.write_text(out.read_text() + '{"schema": 1, "torn')
    code, text, err = run("compare", str(out), "--json")
    assert code == 0
    assert len(json.loads(text)["rows"]) == len(rows)
    assert "records.jsonl" in err
    code, text, _ = run("compare", str(out), "--csv", str(tmp_path / "c.csv"))
    assert code == 0
    assert len(pd.read_csv(tmp_path / "c.csv")) == len(rows)


def test_a_profile_over_another_cache_is_planned_over_it(run, tmp_path):
    config, out = tmp_path / "config.json", tmp_path / "records.jsonl"
    config.write_text(json.dumps({**TINY["llama"], "dtype": "float32"}))
    kept = ("--kv-dtype", "int8", "--cache", "paged:block_tokens=8")
    how = ("--device", "cpu", "--repeats", "1", "--prompt", "16", "--output", "3", "--json")
    code, text, _ = run("profile", str(config), *how, *kept, "--out", str(out))
    assert code == 0
    errors = {row["quantity"]: row["relative_error"] for row in json.loads(text)["rows"]}
    assert errors["kv_cache_bytes"] == errors["peak_live_bytes"] == 0
    assert '"cache": {"kind": "paged", "block_tokens": 8}' in out.read_text()
    code, _, err = run("profile", "--suite", "smoke", *kept)
    assert code == 2
    assert "--kv-dtype is not allowed with --suite" in err


def test_without_measurements_compare_says_so(run, tmp_path):
    empty = tmp_path / "none.jsonl"
    empty.write_text("")
    assert "No measurements yet" in run("compare", str(empty))[1]


def test_a_quantised_cache_is_set_in_one_word(run):
    arguments = ("estimate", "llama-3.1-8b", "--gpu", "h200", "--kv-dtype", "int4")
    cache = "quantised:backend=hqq,q_group_size=32,residual_tokens=16"
    code, out, err = run(*arguments, "--cache", cache, "--json")
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer["kv_dtype"] == "int4"
    assert answer["cache"]["backend"] == "hqq"
    assert answer["cache"]["q_group_size"] == 32
    assert "hqq int4 codes" in run(*arguments, "--cache", cache)[1]
    assert run("fit", *arguments[1:], "--cache", "quantised")[0] == 0


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ("ring", "cache.kind='ring' is not in runtime=transformers"),
        ("heap", "cache.kind='heap' is not allowed: one of dynamic"),
        ("quantised:nbits=4", "is not understood at 'nbits=4'"),
        ("quantised:backend", "is not understood at 'backend'"),
        ("quantised:q_group_size=none", "cache.q_group_size='none' is not allowed"),
        ("dynamic:backend=hqq", "cache.backend='hqq' is not allowed: None for"),
    ],
)
def test_a_cache_that_is_not_understood_is_named(run, cache, said):
    code, _, err = run("estimate", "gpt2", "--gpu", "t4", "--cache", cache)
    assert code == 2
    assert said in err
    assert err.count("\n") == 1


STEPS = ("estimate", "llama-3.1-8b", "--gpu", "h200", "--output", "8", "--logits", "last", "--json")


def test_how_steps_are_launched_decides_their_time(run):
    tpot_s = {}
    for mode in ("graph", "captured", "eager"):
        code, out, err = run(*STEPS, "--runtime", "attnlab", "--mode", mode)
        assert (code, err) == (0, "")
        tpot_s[mode] = json.loads(out)["latency"]["tpot_s"]
    assert tpot_s["graph"] < tpot_s["captured"] < tpot_s["eager"]


def test_a_host_twice_as_fast_halves_what_waits_for_it(run):
    eager = (*STEPS, "--mode", "eager", "--host-add")
    fast, slow = (json.loads(run(*eager, s)[1])["latency"]["tpot_s"] for s in ("1e-5", "2e-5"))
    assert slow == pytest.approx(2 * fast)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--mode", "fast"), "mode='fast' is not allowed: one of graph, captured, eager"),
        (("--enforce-eager", "--mode", "graph"), "--mode 'graph' is not allowed with"),
        (("--host-add", "7e-6"), "--host-add is not allowed with --mode graph"),
        (("--mode", "eager", "--host-add", "-1"), "host_add_s=-1.0 is not allowed"),
    ],
)
def test_a_launch_that_cannot_be_is_refused_in_one_line(run, options, said):
    code, out, err = run(*STEPS, *options)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err


def test_a_module_takes_ids_or_embeddings(run):
    code, out, err = run("check", "gpt2", "--takes", "zz")
    assert (code, out) == (2, "")
    assert err == "planner: takes='zz' is not allowed: one of ids, embeddings\n"
