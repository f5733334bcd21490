"""A log → the figures in it, each with the line it stands in, and how the engine was started."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from planner.engine_logs.arguments import Arguments, read_arguments
from planner.engine_logs.wording import FAILURES, PHRASES, UNITS, VERSIONS, WORDINGS
from planner.errors import ConfigError

MAX_CHARACTERS = 64 * 2**20
MAX_MATCHES = 20_000  # lines with one phrase
MAX_LINE = 50_000  # a line of arguments is a few thousand characters long
MAX_CONFIG = 2**20
_PRINTED_CONFIG = re.compile(r"Model config \w{1,60} \{")
ANSI = re.compile(r"\x1b\[[0-9;]{0,12}[A-Za-z]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A number as it was printed; a size in bytes."""

    value: float
    line: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineLog:
    """What a log says: figures by name, the engine's version and arguments, how it failed.

    `config`: the model's config.json, where transformers has printed it.
    """

    figures: Mapping[str, Figure] = field(default_factory=lambda: MappingProxyType({}))
    version: str | None = None
    arguments: Arguments
    config: Mapping[str, Any] | None = None
    failure: str | None = None
    failure_line: str = ""
    mentions_vllm: bool = False

    def get(self, name: str) -> float | None:
        """A figure's number, None where it was not printed."""
        found = self.figures.get(name)
        return None if found is None else found.value

    def size(self, name: str) -> int | None:
        """A figure's number as bytes or a count."""
        value = self.get(name)
        return None if value is None else int(value)

    @property
    def is_vllm(self) -> bool:
        """Whether vLLM printed it, and not torch alone."""
        torch = {
            *("tried", "capacity", "free", "process", "allocated", "private", "unallocated"),
            "reserved",
        }
        seen = bool(set(self.figures) - torch) or self.version is not None or self.mentions_vllm
        return seen or self.failure in ("no blocks", "too long", "not free")


def read_log(text: str) -> EngineLog:
    """The figures of a start-up log or an out-of-memory message; ConfigError if there are none."""
    if not isinstance(text, str):
        raise ConfigError("the log is not text")
    if not text.strip():
        raise ConfigError("the log is empty")
    if "\0" in text[:65_536]:
        raise ConfigError("the log is not text: it has null bytes")
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"the log has {len(text):,} characters: at most {MAX_CHARACTERS:,}; the start-up is "
            "what counts"
        )
    figures = {name: figure for name in PHRASES if (figure := _figure(text, name)) is not None}
    failure, failure_line = _failure(text)
    if not set(figures) - {"utilization", "batched_tokens"} and failure is None:
        raise ConfigError(
            'the log has nothing of a vLLM start-up ("Model loading took", "GPU KV cache size", '
            "…) and no torch.OutOfMemoryError"
        )
    return EngineLog(
        figures=MappingProxyType(figures),
        version=_version(text),
        arguments=read_arguments(text),
        config=_config(text),
        failure=failure,
        failure_line=failure_line,
        mentions_vllm=re.search("vllm", text, re.IGNORECASE) is not None,
    )


def _lines(text: str, words: str) -> Iterator[tuple[int, str]]:
    """Where the lines that have these words begin, and the lines, without colours."""
    at = text.find(words)
    for _ in range(MAX_MATCHES):
        if at < 0:
            return
        start = text.rfind("\n", max(0, at - MAX_LINE), at) + 1 or max(0, at - MAX_LINE)
        end = text.find("\n", at, at + MAX_LINE)
        end = min(len(text), at + MAX_LINE) if end < 0 else end
        yield start, ANSI.sub("", text[start:end])
        at = text.find(words, end)


def _figure(text: str, name: str) -> Figure | None:
    """One figure out of all lines that have it, in any wording."""
    pick = PHRASES[name][0]
    found: list[tuple[int, Figure]] = []
    for wording in WORDINGS[name]:
        for start, line in _lines(text, wording.keyword):
            for match in wording.pattern.finditer(line):
                figure = Figure(value=_value(match), line=_short(line, match.span()))
                found.append((start, figure))
    if not found:
        return None
    match pick:
        case "largest":
            return max(found, key=lambda place: place[1].value)[1]
        case "smallest":
            return min(found, key=lambda place: place[1].value)[1]
        case "last":
            return max(found, key=lambda place: place[0])[1]
    return min(found, key=lambda place: place[0])[1]


def _failure(text: str) -> tuple[str | None, str]:
    """What it ended with, the last that is said, and the sentence that says so."""
    last = max(FAILURES, key=lambda words: text.rfind(words))
    at = text.rfind(last)
    if at < 0:
        return None, ""
    start = text.rfind("\n", max(0, at - MAX_LINE), at) + 1 or max(0, at - MAX_LINE)
    line = ANSI.sub("", text[start : at + 400].split("\n")[0])
    return FAILURES[last], _sentence(line, line.index(last))


def _value(match: re.Match[str]) -> float:
    found = match.groupdict()
    if found.get("size") is not None:
        return float(found["size"].replace(",", "")) * UNITS[found["unit"]]
    return float(found["number"].replace(",", ""))


def _version(text: str) -> str | None:
    for pattern in VERSIONS:
        match = pattern.search(text)
        if match is not None:
            return match["version"]
    return None


def _config(text: str) -> dict[str, Any] | None:
    """What transformers prints as "Model config LlamaConfig {…}"."""
    match = _PRINTED_CONFIG.search(text)
    if match is None:
        return None
    try:
        found, _ = json.JSONDecoder().raw_decode(text[match.end() - 1 : match.end() + MAX_CONFIG])
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "model_type" in found else None


def _sentence(line: str, at: int) -> str:
    """The sentence that says it, without what a logger or an exception's name puts before."""
    begin = max(line.rfind(mark, 0, at) + len(mark) for mark in ("Error: ", ". ", "] "))
    begin = begin if line[:at].rstrip() and begin > len("Error: ") else 0
    text = line[begin : begin + 400].strip()
    return text if len(text) <= 160 else f"{text[:157].rsplit(' ', 1)[0]} …"


def _short(line: str, span: tuple[int, int]) -> str:
    """The part of a line around a match, for people."""
    start = max(0, span[0] - 60)
    return line[start : max(span[1], start + 160)].strip()[:200]
