"""`planner check`: every kind of target, every output, exit codes 0, 1, 2."""

import json

import jsonschema
import pandas as pd
import pytest

from planner.checks.edges import found
from planner.checks.written import markdown, sarif, table
from planner.cli.commands import main
from planner.cli.schema import schema_text

FACTORY = """
import torch
from torch import nn

class Leaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.conv = nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, ids):
        return self.head(self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2))

def make():
    return Leaky()

def floats():
    return nn.Linear(8, 8), torch.randn(1, 4, 8)

def stops():
    raise SystemExit(3)

def number():
    return 5
"""
BROKEN = "import torch\ndef f(q, k, v):\n    return torch.softmax(q @ k.mT, -1) @ v\n"


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["check", *arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def test_a_sound_model_exits_with_0(run):
    assert run("llama-3.1-8b") == (0, "llama-3.1-8b: nothing found\n", "")


def test_a_critical_finding_exits_with_1_and_names_the_remedy(run):
    code, out, _ = run("llama-2-7b", "--gpu", "a100-80gb", "--batch", "64", "--context", "4096")
    assert code == 1
    assert "1 critical" in out
    assert "GQA with 8 kv heads" in out


def test_source_is_checked_as_file_and_as_folder(run, tmp_path):
    (tmp_path / "model.py").write_text(BROKEN)
    for target in ("model.py", str(tmp_path)):
        code, out, err = run(target, "--json")
        answer = json.loads(out)
        assert (code, err) == (1, "")
        assert [f["id"] for f in answer["findings"]] == ["attention-unscaled"]
        jsonschema.validate(answer, json.loads(schema_text("check")))


def test_a_factory_is_probed(run, tmp_path):
    (tmp_path / "own_models.py").write_text(FACTORY)
    code, out, err = run("own_models:make", "--json")
    answer = json.loads(out)
    assert (code, err) == (1, "")
    assert answer["findings"][0]["id"] == "causal-leak"
    assert "Conv1d" in answer["findings"][0]["where"]
    jsonschema.validate(answer, json.loads(schema_text("check")))
    assert run("own_models:floats") == (0, "own_models:floats: nothing found\n", "")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("own_again:stops", "own_again:stops failed: it exits with 3"),
        ("own_again:number", "returned int"),
        ("own_again:absent", "has no function"),
        ("no_such_module:make", "cannot be imported"),
        ("no-such-model", "neither a file nor in the catalogue"),
        ("absent.py", "no such file"),
        ("", "target=''"),
        ("/dev/null", "neither a file"),
        ("a\0b", "neither a file"),
    ],
)
def test_what_cannot_be_checked_is_one_line_and_exit_2(run, tmp_path, target, said):
    (tmp_path / "own_again.py").write_text(FACTORY)
    code, out, err = run(target)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_sarif_places_findings_in_files(run, tmp_path):
    (tmp_path / "model.py").write_text(BROKEN)
    run("model.py", "--sarif", "out.sarif")
    report = json.loads((tmp_path / "out.sarif").read_text())
    (ran,) = report["runs"]
    (result,) = ran["results"]
    assert report["version"] == "2.1.0"
    assert result["level"] == "error"
    assert ran["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
    place = result["locations"][0]["physicalLocation"]
    assert place == {"artifactLocation": {"uri": "model.py"}, "region": {"startLine": 3}}


def test_sarif_is_written_where_nothing_is_found_too(run, tmp_path):
    assert run("llama-3.1-8b", "--sarif", "out.sarif")[0] == 0
    assert json.loads((tmp_path / "out.sarif").read_text())["runs"][0]["results"] == []


def test_markdown_and_csv_hold_every_finding(run, tmp_path):
    arguments = ("--gpu", "t4", "--context", "4096", "--markdown", "m.md", "--csv", "c.csv")
    run("llama-2-7b", "--batch", "32", *arguments)
    cells = pd.read_csv(tmp_path / "c.csv")
    text = (tmp_path / "m.md").read_text()
    assert len(cells) == text.count("\n## ")
    assert {"severity", "id", "seen", "do", "next"} <= set(cells.columns)


def test_text_of_others_is_neither_formula_nor_markup(tmp_path):
    from planner.report import csv_text

    hostile = [found("not-checked", "=cmd()", where="<img src=x>|a", file="x y.py", line=2)]
    assert ",'=cmd()," in csv_text(table(hostile))
    assert "<img" not in markdown(hostile, "a|b")
    assert '"uri": "x%20y.py"' in sarif(hostile, "t")


def test_control_characters_do_not_reach_the_terminal(run, tmp_path):
    (tmp_path / "\x1b[31mred.py").write_text("def (")
    _, out, _ = run(".")
    assert "\x1b" not in out
    assert "[31mred.py" in out
