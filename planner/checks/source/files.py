"""Python files of a target, parsed within bounds, and every rule run over each."""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from planner.checks.edges import found
from planner.checks.source.attention import attention_rules
from planner.checks.source.blocks import post_norm
from planner.checks.source.decoders import unmasked_modules
from planner.checks.source.flow import Source
from planner.checks.source.loops import generation_loops, growing_caches
from planner.checks.source.tables import position_tables
from planner.errors import ConfigError, shown
from planner.findings import Finding

MOST_BYTES, MOST_FILES = 4 * 2**20, 20_000
SKIPPED = {"__pycache__", "node_modules", "site-packages", "build", "dist"}
RULES = (
    attention_rules, unmasked_modules, post_norm, generation_loops, growing_caches, position_tables,
)  # fmt: skip


def check_source(path: Path, *, required: bool = True) -> list[Finding]:
    """The findings of a .py file or of all of them under a folder.

    A file that is no Python is refused, in a folder it is named and passed over. `required`:
    ConfigError for a folder without a .py file.
    """
    if path.is_file():
        return list(findings_of(path))
    findings: list[Finding] = []
    count = 0
    for file in python_files(path):
        count += 1
        if count > MOST_FILES:
            raise ConfigError(f"{shown(str(path))} has more than {MOST_FILES:,} .py files")
        try:
            findings += findings_of(file)
        except ConfigError as error:
            findings.append(found("not-checked", str(error), where=str(file), file=str(file)))
    if required and not count:
        raise ConfigError(
            f"{shown(str(path))} has neither a config.json nor a .py file to be checked"
        )
    return findings


def python_files(folder: Path) -> Iterator[Path]:
    """All .py files below a folder, sorted; links to folders are not followed."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.startswith("."))
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(root) / name


def findings_of(file: Path) -> Iterator[Finding]:
    """The findings of one file; ConfigError in one line for what cannot be parsed."""
    return check_text(contents(file), str(file))


def check_text(content: bytes, file: str) -> Iterator[Finding]:
    """The findings of a file's content, which is named `file`."""
    attends = re.search(rb"softmax|Softmax|scaled_dot_product|sdpa", content) is not None
    source = Source(tree=parsed(content, file), file=file, attends=attends)
    for rule in RULES:
        try:
            yield from rule(source)
        except RecursionError:
            raise ConfigError(f"{file} cannot be checked: nested too deeply") from None


def contents(file: Path) -> bytes:
    """The bytes of a file of a sensible size."""
    try:
        if not file.is_file():
            raise ConfigError(f"{file} cannot be read: not a regular file")
        if file.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{file} has more than {MOST_BYTES >> 20} MiB: not a module")
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None


def parsed(content: bytes, file: str) -> ast.Module:
    """The syntax tree; nothing of the file runs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(content)
    except SyntaxError as error:
        raise ConfigError(f"{file} is not Python: {error.msg} (line {error.lineno})") from None
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(f"{file} is not Python: {reason}") from None
