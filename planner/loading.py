"""A Model from what people have: a catalogue name, config.json, a folder, a GGUF file, a dict."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from planner.errors import ConfigError, shown
from planner.headers.gguf_files import find_gguf, read_gguf
from planner.headers.hub import hub_config, is_hub, parsed
from planner.huggingface import read_config
from planner.huggingface.gguf import config_from_gguf
from planner.model import Model

MAX_CONFIG_BYTES = 8 * 2**20


@cache
def catalogue() -> dict[str, Path]:
    """The named models and the config each is read from."""
    folder = Path(str(files("planner.catalog").joinpath("models")))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def load_model(source: str | Path | Mapping[str, Any]) -> Model:
    """A Model from a catalogue name, a config.json or its folder, a .gguf file, or a dict.

    `hf:org/name[@revision]` asks the Hugging Face Hub for the config. Raises ConfigError where
    nothing of that name exists, the file is no JSON object, or its content is not a model that this
    planner reads.
    """
    if isinstance(source, Mapping):
        return read_config(source)
    name, config = load_config(source)
    model = read_config(config)
    return replace(model, name=name or model.name)


def load_config(source: str | Path) -> tuple[str, dict[str, Any]]:
    """(name, content of the config.json) of a catalogue name, a file, a folder or `hf:org/name`."""
    if isinstance(source, str) and is_hub(source):
        return parsed(source)[0], _from_file(hub_config(source))
    if isinstance(source, str) and source in catalogue():
        return source, _from_file(catalogue()[source])
    if not isinstance(source, str | Path):
        raise ConfigError(f"model={shown(source)} is not allowed: a name, a path or a dict")
    path = Path(source)
    try:
        is_folder, found = path.is_dir(), path.is_file()
    except (OSError, ValueError):  # too long for a path, or a null byte in it
        is_folder = found = False
    if is_folder:
        path = _in_folder(path)
        found = path.is_file()
    if not found:
        near = difflib.get_close_matches(str(source), catalogue(), n=3, cutoff=0.4)
        known = ", ".join(near or catalogue())
        raise ConfigError(
            f"model={shown(str(source))} is neither a file nor in the catalogue: {known}"
        )
    name = path.parent.name if path.name == "config.json" else path.stem
    if path.suffix == ".gguf":
        return name, config_from_gguf(read_gguf(path)[0], origin=str(path))
    return name, _from_file(path)


def _in_folder(folder: Path) -> Path:
    config = folder / "config.json"
    return config if config.is_file() else find_gguf(folder) or config


def read_json(text: str | bytes, *, origin: str) -> dict[str, Any]:
    """The JSON object in `text`; ConfigError that names `origin` for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} is not JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{origin} holds {shown(content)}: a JSON object is needed")
    return content


def _from_file(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path} has more than {MAX_CONFIG_BYTES} bytes: not a config.json")
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    return read_json(text, origin=str(path))
