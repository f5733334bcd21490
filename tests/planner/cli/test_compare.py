"""`planner compare`: repeatability first, groups, baselines, and JSON that only grows."""

import json
from dataclasses import replace

import pytest

from planner.cli.commands import main
from planner.timing.calibration import load as load_calibration
from profiles import records
from tests.profiles.made import ENVIRONMENT, measured

GIB = 2**30


@pytest.fixture
def run(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["compare", *map(str, arguments)])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


@pytest.fixture
def file(tmp_path):
    """Two suites, two splits, one point measured twice."""
    path = tmp_path / "records.jsonl"
    for suite, split, peak in (
        ("training", "calibration", 2 * GIB),
        ("allocator", "held-out", 3 * GIB),
    ):
        one = measured(suite=suite, split=split, peak_allocated_bytes=peak, ttft_s=(0.1, 0.2))
        records.append(path, one)
    return path


def test_what_others_measured_is_shown_apart(run, file, tmp_path):
    table = tmp_path / "published.csv"
    code, out, _ = run("--published", "--json", "--csv", table)
    answer = json.loads(out)
    assert code == 0
    assert {row["source"] for row in answer["rows"]} == {row["source"] for row in answer["summary"]}
    times, engines = answer["latency_rows"], answer["latency_summary"]
    assert {row["engine"] for row in times} == {row["engine"] for row in engines}
    assert len(table.read_text().splitlines()) == 1 + len(answer["rows"]) + len(times)
    assert run("--published")[0] == 0
    assert run("--published", file)[0] == 2


def test_repeatability_stands_before_any_error(run, file):
    code, out, err = run(file)
    assert (code, err) == (0, "")
    order = ["Repeatability", "Predicted beside measured", "Errors: predicted", "held-out"]
    places = [out.index(word) for word in order]
    assert places == sorted(places)
    assert "40.00%" in out  # 2 and 3 GiB


def test_a_device_without_repeated_runs_is_said_so(run, tmp_path):
    path = tmp_path / "one.jsonl"
    records.append(path, measured(ttft_s=(0.1, 0.2)))
    assert "h200: no point was measured by two runs yet" in run(path)[1]


def test_records_of_a_cpu_that_was_not_timed_are_told_in_a_line(run, tmp_path):
    path = tmp_path / "cpu.jsonl"
    timed = load_calibration("cpu").measured_on
    for name, threads in ((timed.name, timed.threads), ("Another CPU", 16)):
        where = replace(ENVIRONMENT, device="cpu", gpu="cpu", cpu=name, cpu_threads=threads)
        records.append(path, measured(ttft_s=(0.1,), attention="sdpa", environment=where))
    told = (
        f"1 CPU record of Another CPU, 16 threads set against ops on {timed.in_words}: there, "
        "planner calibrate --gpu cpu --budget 1m times this machine"
    )
    assert run(path)[2] == f"planner: {told}\n"


def test_groups_take_the_place_of_rows(run, file):
    out = run(file, "--by", "suite")[1]
    assert "Predicted beside measured" not in out
    assert "allocator" in out
    assert "Baselines" not in out


def test_baselines_stand_beside_our_own_error(run, file):
    out = run(file, "--baselines")[1]
    assert "weights-only" in out
    assert "naive-roofline" in out
    assert "our mean" in out


def test_another_group_is_refused_in_one_line(run, file):
    code, out, err = run(file, "--by", "weather")
    assert (code, out) == (2, "")
    assert "--by weather is not allowed: one of suite, model, phase, device" in err
    assert err.count("\n") == 1


def test_json_has_all_parts_and_fills_those_that_were_asked_for(run, file):
    plain = json.loads(run(file, "--json")[1])
    parts = ["rows", "summary", "repeatability", "groups", "baselines", "peers"]
    assert list(plain) == parts
    assert plain["groups"] == plain["baselines"] == plain["peers"] == []
    (runs, *_) = plain["repeatability"]
    assert (runs["between"], runs["points"], runs["worst_spread"]) == ("runs", 1, 0.4)
    full = json.loads(run(file, "--by", "suite", "--baselines", "--json")[1])
    assert full["rows"] == plain["rows"]
    assert {group["group"] for group in full["groups"]} == {"allocator", "training"}
    assert {b["method"] for b in full["baselines"]} == {"weights-only", "naive-roofline"}
    assert {p["quantity"] for p in full["peers"]} == {"ttft_s", "tpot_s"}
