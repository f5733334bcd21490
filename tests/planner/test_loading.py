from __future__ import annotations

import json

import pytest

import planner
from planner import ConfigError
from tests.planner.configs import TINY


def test_a_name_a_file_a_folder_and_a_dict_give_the_same_model(tmp_path):
    config = TINY["llama"]
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    from_dict = planner.load_model(config)
    assert planner.load_model(folder).layers == from_dict.layers
    assert planner.load_model(str(folder / "config.json")).name == "my-model"


def test_an_unknown_name_lists_its_neighbours():
    with pytest.raises(ConfigError, match=r"model='llama-3.1-8' .* catalogue: llama-3\.1-8b"):
        planner.load_model("llama-3.1-8")


@pytest.mark.parametrize(
    "content", ["{", "", "[1, 2]", '"llama"', "\x00\x01", "nul", "[" * 100_000]
)
def test_what_is_no_json_object_is_one_line(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        planner.load_model(path)
    assert "\n" not in str(caught.value)


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "weights.json"
    path.write_bytes(b" " * (9 * 2**20))
    with pytest.raises(ConfigError, match="not a config"):
        planner.load_model(path)


@pytest.mark.parametrize("source", ["x" * 5_000, "a\0b", ""])
def test_names_that_are_no_paths_are_refused_in_one_line(source):
    with pytest.raises(ConfigError, match="neither a file nor in the catalogue"):
        planner.load_model(source)


@pytest.mark.parametrize("source", [None, 5, ["llama"]])
def test_other_types_are_refused(source):
    with pytest.raises(ConfigError, match="is not allowed"):
        planner.load_model(source)
