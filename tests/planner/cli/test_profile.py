"""`planner profile --suite`: what is refused in one line, and a run that has no time."""

import re

import pytest

from planner.cli import commands as cli
from profiles import records
from profiles.suites import SUITES


def ran(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(["profile", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "MODEL is missing: a model as elsewhere, or --suite NAME"),
        (["gpt2", "--suite", "smoke"], "MODEL='gpt2' is not allowed with --suite"),
        (["--suite", "all"], "suite='all' is not allowed: one of smoke, cpu, inference, training"),
        (["--suite", "all"], "microbench, overheads"),
        (["--suite", "smoke", "--budget", "9x"], "budget='9x' is not allowed"),
        (["gpt2", "--missing"], "--missing is not allowed with no --suite"),
        (
            ["gpt2", "--memory-viz", "run.pickle", "--device", "cpu"],
            "--memory-viz is not allowed on device=cpu: cuda, whose allocator keeps a history",
        ),
        (
            ["--suite", "smoke", "--memory-viz", "run.pickle"],
            "--memory-viz is not allowed with --suite",
        ),
        (["gpt2", "--budget", "9s"], "--budget is not allowed with no --suite"),
        (["--suite", "microbench", "--json"], "--json is not allowed with --suite microbench"),
        (["--suite", "overheads", "--ray", "local"], "--ray is not allowed with --suite overheads"),
        (
            ["--suite", "smoke", "--ray", "local", "--missing"],
            "--missing is not allowed with --ray",
        ),
    ],
)
def test_options_that_contradict_are_refused_in_one_line(capsys, arguments, said):
    code, out, err = ran(capsys, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_the_help_names_every_suite(capsys):
    _, out, _ = ran(capsys, "--help")
    words = set(re.findall(r"\w+", out))
    assert words >= {*SUITES, "microbench", "overheads"}


def test_a_suite_without_time_measures_nothing_and_says_so(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # a lock of its own
    out_file = tmp_path / "r.jsonl"
    code, out, _ = ran(
        capsys, "--suite", "smoke", "--device", "cpu", "--budget", "0.001s", "--out", out_file
    )
    assert code == 0
    assert out.count("the budget was used up") == 4
    assert "0 records appended" in out
    assert records.load([out_file]) == ([], [])
