"""`planner.check`: what kind of target it is, and the checks for that kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from planner.checks.edges import found
from planner.checks.layout import check_layout
from planner.checks.load import check_load
from planner.checks.positions import check_positions
from planner.checks.scores import check_scores
from planner.checks.source import check_source
from planner.checks.subject import Load, Subject, text_part
from planner.checks.tying import check_tying
from planner.errors import ConfigError, shown
from planner.findings import Finding, worst_first
from planner.huggingface import READERS, read_config
from planner.loading import load_config
from planner.model import Model

RULES = (check_positions, check_scores, check_layout, check_load, check_tying)


def check(
    target: str | Path | Mapping[str, Any] | Model,
    *,
    context_tokens: int | None = None,
    batch: int = 1,
    gpu: str | None = None,
    runtime: str = "transformers",
    tensor_parallel: int = 1,
    dtype: str | None = None,
    kv_dtype: str | None = None,
) -> list[Finding]:
    """Sharp edges of a config or of source code, the worst first. Nothing of it is executed.

    `target`: a catalogue name, a config.json, its folder, a dict, a Model; a .py file or a folder
    of them (a folder with both is checked as both). The rest is the load it is to carry: the cache
    is held against `gpu` at `batch` × `context_tokens`. Raises ConfigError for what cannot be read.
    For live modules there is `attnlab.probes.check`.
    """
    load = Load(
        context_tokens=context_tokens,
        batch=batch,
        gpu=gpu,
        runtime=runtime,
        tensor_parallel=tensor_parallel,
        dtype=dtype,
        kv_dtype=kv_dtype,
    )
    if isinstance(target, Model):
        return check_config(target.config, load, model=target)
    if isinstance(target, Mapping):
        return check_config(target, load)
    if not isinstance(target, str | Path):
        raise ConfigError(
            f"target={shown(target)} is not allowed: a name, a path, a config or a Model"
        )
    if not str(target):
        raise ConfigError("target='' is not allowed: a name, a path, a config or a Model")
    path = Path(target)
    folder, file = kind_of(path)
    if path.suffix == ".py":
        if not file:
            raise ConfigError(f"{shown(str(target))} cannot be checked: no such file")
        return worst_first(check_source(path))
    configured = folder and ((path / "config.json").is_file() or any(path.glob("*.gguf")))
    sources = check_source(path, required=not configured) if folder else []
    if folder and not configured:
        return worst_first(sources)
    config = load_config(target)[1]
    beside = path if folder else path.parent if file and path.name == "config.json" else None
    at = path / "config.json" if folder else path if file else None
    return worst_first([*check_config(config, load, folder=beside, file=at), *sources])


def kind_of(path: Path) -> tuple[bool, bool]:
    """Whether it is a folder, and whether a file."""
    try:
        return path.is_dir(), path.is_file()
    except (OSError, ValueError):  # too long for a path, or a null byte in it
        return False, False


def check_config(
    config: Mapping[str, Any],
    load: Load,
    *,
    model: Model | None = None,
    folder: Path | None = None,
    file: Path | None = None,
) -> list[Finding]:
    """The findings of a config. A type without a reader is checked by its plain fields alone."""
    model_type = config.get("model_type")
    if model is None and not isinstance(model_type, str):
        raise ConfigError(
            "model_type is missing from the config: it names the architecture"
            if model_type is None
            else f"model_type={shown(model_type)} is not allowed: a word"
        )
    unread: ConfigError | None = None
    if model is None:
        try:
            model = read_config(config)
        except ConfigError as error:
            unread = error
    subject = Subject(
        config=config,
        text=text_part(config),
        load=load,
        model=model,
        unread=str(unread or ""),
        folder=folder,
    )
    findings = [finding for rule in RULES for finding in rule(subject)]
    if unread is not None:
        if model_type in READERS and not any(finding.fails for finding in findings):
            raise unread
        findings.append(
            found("not-checked", f"{unread}: only the plain fields are checked", where="model_type")
        )
    return worst_first(placed(findings, file))


def placed(findings: Iterable[Finding], file: Path | None) -> Iterable[Finding]:
    """With the file that they are about, and the line of the field there."""
    from dataclasses import replace

    if file is None or file.suffix != ".json":
        return findings
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()

    def line(field: str) -> int:
        quoted = f'"{field}"'
        return next((i for i, text in enumerate(lines, 1) if field and quoted in text), 1)

    return [replace(f, file=str(file), line=line(f.where)) for f in findings]
