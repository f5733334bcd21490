"""safetensors headers, of one file or of a folder with an index: names, dtypes, shapes, bytes.

A file is 8 bytes of header length, a JSON header, the data. Only the header is read, and nothing in
it is believed: https://github.com/huggingface/safetensors#format. It is taken apart tensor by
tensor, so that a header made to explode in a JSON parser costs no more than its own bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

from planner.errors import ConfigError, shown
from planner.findings import Finding, listed, missing_shards
from planner.headers.stored import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    StoredTensor,
    check_name,
    check_sizes,
    file_bytes,
    names_in,
)

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_ENTRY_BYTES = 2048
DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Bits of one element, by the format's own words."""

# possessive (*+, ++): no backtracking, so neither time nor memory beyond the bytes matched
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_ENTRY = re.compile(
    rb"\s*+(%b)\s*+:\s*+\{((?:[^{}\"]++|%b)*+)\}\s*+" % (_STRING, _STRING), re.DOTALL
)
_PAIR = re.compile(rb"\s*+(%b)\s*+:\s*+(%b)\s*+,?" % (_STRING, _STRING), re.DOTALL)


def read_safetensors(path: Path) -> tuple[StoredTensor, ...]:
    """The tensors of one file; ConfigError in one line where it is not what it says."""
    size = file_bytes(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ConfigError(
                    f"{path} is no safetensors file: a header of {length:,} bytes in {size:,}, "
                    f"at most {MAX_HEADER_BYTES:,}"
                )
            start = file.read(1)  # a header of another format is not read whole
            text = start + file.read(length - 1) if start == b"{" else start
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    spans = []
    for name, body in flat_objects(text, origin=str(path)):
        if name != "__metadata__":
            spans.append(_tensor_span(name, body, path))
    end = check_spans(spans, origin=str(path))
    if end != size - 8 - length:
        raise ConfigError(
            f"{path} is truncated or padded: its header describes {end:,} bytes of data, "
            f"{size - 8 - length:,} are there"
        )
    return tuple(tensor for _, tensor in spans)


def flat_objects(text: bytes, *, origin: str) -> Iterator[tuple[str, bytes]]:
    """(name, inside of its braces) of every object in an object of flat objects."""
    position, seen = 1, set()
    if not text.startswith(b"{"):
        raise ConfigError(f"{origin} has no JSON object for a header")
    if re.fullmatch(rb"\{\s*+\}\s*+", text):
        return
    while True:
        entry = _ENTRY.match(text, position)
        if entry is None:
            raise ConfigError(f"{origin} has a broken header at byte {position}")
        name = _json(entry[1], origin)
        if name in seen:
            raise ConfigError(f"{origin} describes {shown(name)} twice")
        seen.add(name)
        if len(seen) > MAX_TENSORS:
            raise ConfigError(f"{origin} describes more than {MAX_TENSORS:,} tensors")
        yield str(name), entry[2]
        position = entry.end()
        mark, position = text[position : position + 1], position + 1
        if mark == b"}":
            if text[position:].strip():
                raise ConfigError(f"{origin} has a broken header at byte {position}")
            return
        if mark != b",":
            raise ConfigError(f"{origin} has a broken header at byte {position - 1}")


def _json(text: bytes, origin: str, **options: Any) -> Any:
    try:
        return json.loads(text, **options)
    except (ValueError, RecursionError):
        raise ConfigError(f"{origin} has a broken header: {shown(text[:40])}") from None


def _tensor_span(name: str, body: bytes, path: Path) -> tuple[tuple[int, int], StoredTensor]:
    pairs: Any = []
    if len(body) <= MAX_ENTRY_BYTES:
        pairs = _json(b"{%b}" % body, str(path), object_pairs_hook=list)
    fields = dict(pairs)
    if len(pairs) != 3 or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ConfigError(f"{path}: {shown(name)} needs dtype, shape, data_offsets and no more")
    return stored(name, **fields, file=path.name, origin=str(path))


def stored(
    name: str, *, dtype: object, shape: object, data_offsets: object, file: str, origin: str
) -> tuple[tuple[int, int], StoredTensor]:
    """((begin, end), tensor) of one entry, if its size follows from its shape and dtype."""
    name = check_name(name, origin=origin)
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise ConfigError(
            f"{origin}: dtype={shown(dtype)} of {shown(name)} is not known: one of "
            f"{', '.join(DTYPE_BITS)}"
        )
    sizes = check_sizes("shape", shape, name=name, origin=origin)
    offsets = check_sizes("data_offsets", data_offsets, name=name, origin=origin)
    begin, end = offsets if len(offsets) == 2 else (0, -1)
    if (end - begin) * 8 != prod(sizes) * bits:
        raise ConfigError(
            f"{origin}: {shown(name)} has {end - begin:,} bytes, {dtype} of shape "
            f"{shown(list(sizes))} needs {-(-prod(sizes) * bits // 8):,}"
        )
    tensor = StoredTensor(
        name=name, dtype=str(dtype), shape=sizes, size_bytes=end - begin, file=file
    )
    return (begin, end), tensor


def check_spans(spans: Iterable[tuple[tuple[int, int], StoredTensor]], *, origin: str) -> int:
    """Where the data ends, if tensors lie one after another; ConfigError for holes or overlaps."""
    position = 0
    for (begin, end), tensor in sorted(spans, key=lambda span: span[0]):
        if begin != position:
            raise ConfigError(
                f"{origin}: {shown(tensor.name)} begins at byte {begin:,}, the tensor before it "
                f"ends at {position:,}"
            )
        position = end
    return position


def read_folder(folder: Path) -> tuple[tuple[StoredTensor, ...], tuple[Finding, ...]]:
    """The tensors that transformers would load from a folder, and what is odd about its files."""
    findings: list[Finding] = []
    there = [path for path in names_in(folder) if path.suffix == ".safetensors"]
    weight_map: dict[str, str] = {}
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        weight_map = read_index(folder / INDEX)
        named = sorted(set(weight_map.values()))
        files = [folder / name for name in named if (folder / name).is_file()]
        findings += _absent(weight_map, {path.name for path in files}, str(folder))
    elif there:
        files = there
        findings.append(
            Finding(
                id="no-index",
                severity="warning",
                title="Neither model.safetensors nor an index",
                seen=listed([path.name for path in there]),
                why="transformers does not find these files by itself; all of them are counted.",
                where=str(folder),
            )
        )
    else:
        raise ConfigError(_no_weights(folder))
    tensors = joined(read_safetensors(path) for path in files)
    if weight_map:
        findings += index_mismatches(weight_map, tensors, str(folder))
    findings += _others([path for path in there if path not in files], folder)
    return tensors, tuple(findings)


def joined(files: Iterable[tuple[StoredTensor, ...]]) -> tuple[StoredTensor, ...]:
    """The tensors of all files; ConfigError where two files hold the same one."""
    where: dict[str, StoredTensor] = {}
    for tensors in files:
        for tensor in tensors:
            if tensor.name in where:
                raise ConfigError(
                    f"{shown(tensor.name)} is in {where[tensor.name].file} and in {tensor.file}"
                )
            where[tensor.name] = tensor
        if len(where) > MAX_TENSORS:
            raise ConfigError(f"the files hold more than {MAX_TENSORS:,} tensors")
    return tuple(where.values())


def read_index(path: Path) -> dict[str, str]:
    """Tensor → file of a shard index; files are names in the same folder, nothing else."""
    if file_bytes(path) > MAX_HEADER_BYTES:
        raise ConfigError(f"{path} has more than {MAX_HEADER_BYTES:,} bytes: not a shard index")
    try:
        text = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    body = dict(flat_objects(text, origin=str(path))).get("weight_map")
    if body is None:
        raise ConfigError(f"{path} has no weight_map: not a shard index")
    weight_map: dict[str, str] = {}
    body, position = body.strip(), 0
    while position < len(body):
        pair = _PAIR.match(body, position)
        if pair is None or len(weight_map) >= MAX_TENSORS:
            raise ConfigError(f"{path} has a broken weight_map at byte {position}")
        name, file = (str(_json(text, str(path))) for text in pair.groups())
        weight_map[check_name(name, origin=str(path))] = check_shard(file, origin=str(path))
        position = pair.end()
    return weight_map


def check_shard(name: str, *, origin: str) -> str:
    """A file name that stays in its folder; ConfigError otherwise."""
    if not re.fullmatch(r"[\w\-][\w.\-]{0,250}\.safetensors", name):
        raise ConfigError(
            f"{origin} points to {shown(name)}: a .safetensors file beside the index is allowed"
        )
    return name


def _absent(weight_map: dict[str, str], there: set[str], where: str) -> Iterator[Finding]:
    named = set(weight_map.values())
    if absent := sorted(named - there):
        lost = sum(file not in there for file in weight_map.values())
        yield missing_shards(absent, of=len(named), tensors=lost, where=where)


def index_mismatches(
    weight_map: dict[str, str], tensors: Iterable[StoredTensor], where: str
) -> Iterator[Finding]:
    """Tensors that lie elsewhere than the index says, or that only one of them has."""
    files = {tensor.name: tensor.file for tensor in tensors}
    there = set(files.values())
    wrong = [n for n, file in weight_map.items() if file in there and files.get(n) != file]
    unnamed = [name for name in files if name not in weight_map]
    if wrong or unnamed:
        yield Finding(
            id="index-mismatch",
            severity="error" if wrong else "warning",
            title=f"Index and shards disagree on {len(wrong) + len(unnamed):,} tensors",
            seen=listed(wrong + unnamed),
            why="What is loaded depends on which of the two a program follows.",
            do="Write the index anew, or download index and shards of one revision.",
            where=where,
        )


def _others(files: list[Path], folder: Path) -> Iterator[Finding]:
    if files:
        yield Finding(
            id="other-files",
            severity="note",
            title="More safetensors files lie beside those that are loaded",
            seen=listed([path.name for path in files]),
            why="They are not counted.",
            where=str(folder),
        )


def _no_weights(folder: Path) -> str:
    pickled = [path.name for path in names_in(folder) if path.suffix in PICKLED]
    if not pickled:
        return f"{folder} holds no weights: {SINGLE}, {INDEX} with its shards, or a .gguf file"
    return (
        f"{folder} holds pickled weights ({listed(pickled)}), which can run code and are never "
        "opened: convert them to safetensors"
    )
