from __future__ import annotations

import io

import pandas as pd
import pytest

import planner
from planner import ConfigError
from planner.format import count, gib, seconds
from planner.report import csv_text, neutral, write_csv


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_formulas_from_user_text_are_neutralised(text):
    assert neutral(text) == f"'{text}"
    table = pd.DataFrame({"name": [text], text: [1]})
    assert not any(
        cell.startswith(text) for line in csv_text(table).splitlines() for cell in line.split(",")
    )


def test_numbers_stay_numbers_in_a_csv():
    table = pd.DataFrame({"bytes": [-5, 7], "ratio": [-0.5, 1.0]})
    pd.testing.assert_frame_equal(pd.read_csv(io.StringIO(csv_text(table))), table)


def test_an_estimate_comes_back_from_its_csv(tmp_path):
    e = planner.estimate(
        planner.load_model("gpt2"),
        planner.Inference(batch=1, prompt_tokens=100),
        planner.Deployment(gpu="t4"),
    )
    e.to_csv(tmp_path / "gpt2.csv")
    table = pd.read_csv(tmp_path / "gpt2.csv")
    assert list(table.columns) == list(e.table().columns)
    assert table["bytes"].sum() == e.memory.total_bytes


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be written"):
        write_csv(pd.DataFrame({"a": [1]}), tmp_path / "absent" / "x.csv")


@pytest.mark.parametrize("path", ["", "/", "/dev/null", "x" * 300])
def test_devices_folders_and_nonsense_are_refused_and_stay(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="cannot be written"):
        write_csv(pd.DataFrame({"a": [1]}), path)
    assert not list(tmp_path.iterdir())


def test_a_link_is_followed(tmp_path):
    (tmp_path / "real.csv").write_text("old")
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    write_csv(pd.DataFrame({"a": [1]}), tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text() == "a\n1\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (gib(2**30), "1.00 GiB"),
        (gib(-(3 * 2**20)), "-3.00 MiB"),
        (gib(12), "12 B"),
        (seconds(0.00313), "3.13 ms"),
        (seconds(2.5), "2.5 s"),
        (seconds(4e-6), "4 µs"),
        (seconds(None), "none"),
        (count(8_030_261_248), "8.03 B"),
    ],
)
def test_numbers_read_with_their_units(text, expected):
    assert text == expected
