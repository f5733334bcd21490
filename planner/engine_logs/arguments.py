"""How an engine was started, from its log: what it says of its configuration, or the command."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field, replace
from typing import Any

MAX_ARGUMENTS = 20_000

NAMES = {
    "model": "model",
    "model_tag": "model",
    "dtype": "dtype",
    "quantization": "quantization",
    "kv_cache_dtype": "kv_cache_dtype",
    "max_model_len": "max_model_len",
    "max_seq_len": "max_model_len",
    "tensor_parallel_size": "tensor_parallel_size",
    "pipeline_parallel_size": "pipeline_parallel_size",
    "gpu_memory_utilization": "gpu_memory_utilization",
    "max_num_batched_tokens": "max_num_batched_tokens",
    "max_num_seqs": "max_num_seqs",
    "block_size": "block_size",
    "enforce_eager": "enforce_eager",
}
"""Names in logs and on command lines → fields of Arguments."""

SHORT = {"tp": "tensor_parallel_size", "pp": "pipeline_parallel_size", "q": "quantization"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Arguments:
    """vLLM's engine arguments as far as the log has them, by their own names."""

    model: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    kv_cache_dtype: str | None = None
    max_model_len: int | None = None
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int | None = None
    gpu_memory_utilization: float | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    block_size: int | None = None
    enforce_eager: bool | None = None
    gpu_names: tuple[str, ...] = field(default=())

    @property
    def seen(self) -> bool:
        """Whether there are any."""
        return self != Arguments(gpu_names=self.gpu_names)


INTEGERS = frozenset(
    (
        *("max_model_len", "tensor_parallel_size", "pipeline_parallel_size", "block_size"),
        *("max_num_batched_tokens", "max_num_seqs"),
    )
)
TEXTS = frozenset(("model", "dtype", "quantization", "kv_cache_dtype"))

_INITIALISED = re.compile(r"(?:LLM engine|llm engine)[^\n]{0,120} with config:? (?P<config>[^\n]+)")
_PAIR = re.compile(
    r"\b(?P<name>[a-z_]{3,32})=(?P<value>'[^'\n]{0,400}'|\"[^\"\n]{0,400}\"|[\w./:-]{1,200})"
)
_NON_DEFAULT = re.compile(r"non-default args: (?P<config>\{[^\n]+)")
_NAMESPACE = re.compile(r"(?:args: Namespace|EngineArgs|LLM)\((?P<config>[^\n]+)")
_COMMAND = re.compile(r"(?:vllm serve|api_server|benchmark_\w+\.py)(?P<rest>[^\n]+)")
_OPTION = re.compile(
    r"--?(?P<name>[A-Za-z][\w-]{0,40})"
    r"(?:[ =]{1,9}(?P<value>'[^']{0,300}'|\"[^\"]{0,300}\"|[^\s'\"-][^\s'\"]{0,300}))?"
)
_GPU = re.compile(
    r"(?:GPU \d{1,3}: |\| {1,4}\d{1,3} {1,4})"
    r"(?P<name>(?:NVIDIA|Tesla|AMD|Quadro)(?: [\w-]{1,24}){1,5})"
)
_RANK = re.compile(r"(?:VllmWorker rank=|Worker_TP)(\d{1,3})\b")


def read_arguments(text: str) -> Arguments:
    """Later sources refine earlier ones: the command, what is not default, the engine's own.

    Where none says how many GPUs there are, as many as workers print.
    """
    found: dict[str, Any] = {}
    command = _COMMAND.search(_joined(text))
    if command is not None:
        found |= _of_command(command["rest"][:MAX_ARGUMENTS])
    for pattern in (_NAMESPACE, _NON_DEFAULT, _INITIALISED):
        match = pattern.search(text)
        if match is not None:
            config = match["config"][:MAX_ARGUMENTS]
            found |= _of_dict(config) if pattern is _NON_DEFAULT else _of_pairs(config)
    if "tensor_parallel_size" not in found and "pipeline_parallel_size" not in found:
        ranks = [int(match[1]) for match in _RANK.finditer(text[: 4 * 2**20])]
        workers = 1 + max(ranks, default=0)
        if workers > 1:
            found["tensor_parallel_size"] = workers
    arguments = Arguments(**found)
    names = dict.fromkeys(match["name"].strip() for match in _GPU.finditer(text[: 4 * 2**20]))
    return replace(arguments, gpu_names=tuple(names)[:16])


def _joined(text: str) -> str:
    """Continued lines of a shell command in one."""
    return re.sub(r"\\[ \t]{0,200}\n[ \t|]{0,80}", " ", text[: 4 * 2**20])


def _of_pairs(text: str) -> dict[str, Any]:
    pairs = {}
    for match in _PAIR.finditer(text):
        name = match["name"]
        if name in NAMES and NAMES[name] not in pairs:
            pairs[NAMES[name]] = _typed(NAMES[name], match["value"].strip("'\""))
    return _known(pairs)


def _of_dict(text: str) -> dict[str, Any]:
    """A Python dict as it is printed; pair by pair where it is cut off."""
    end = text.rfind("}")
    try:
        value = ast.literal_eval(text[: end + 1])
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        value = None
    if not isinstance(value, dict):
        loose = re.sub(r"'([a-z_]{3,32})': ", r"\1=", text)
        return _of_pairs(loose)
    pairs = {NAMES[k]: _typed(NAMES[k], str(v)) for k, v in value.items() if k in NAMES}
    return _known(pairs)


def _of_command(text: str) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    first = text.split()[:1]
    if first and not first[0].startswith("-"):
        pairs["model"] = first[0]
    for match in _OPTION.finditer(text):
        name = match["name"].replace("-", "_")
        name = NAMES.get(SHORT.get(name, name), "")
        if name == "enforce_eager":
            pairs[name] = (match["value"] or "true").lower() != "false"
        elif name and match["value"] is not None:
            pairs[name] = _typed(name, match["value"].strip("'\""))
    return _known(pairs)


def _typed(name: str, value: str) -> Any:
    """A value of the field's type; None for what it cannot be."""
    if name in TEXTS:
        return None if value in ("", "None", "auto") else value.removeprefix("torch.")[:300]
    if name == "enforce_eager":
        return {"True": True, "False": False}.get(value)
    if name in INTEGERS:
        thousands = re.fullmatch(r"(\d{1,6})([kK])", value)
        if thousands is not None:
            return int(thousands[1]) * (1024 if thousands[2] == "K" else 1000)
        return int(value) if value.isdecimal() and len(value) < 12 else None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0 < number <= 1 else None


def _known(pairs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in pairs.items() if value is not None}
