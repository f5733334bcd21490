"""GGUF headers: metadata, names, dtypes, shapes, bytes (github.com/ggml-org/ggml, docs/gguf.md).

The header is parsed here and not by `gguf.GGUFReader`, which cannot be made safe from outside: it
maps the file and then builds a numpy array for every element of every list (a vocabulary takes
seconds and hundreds of MB), multiplies dimensions in uint64, where they wrap, and lets counts of
2⁶⁴ run. The block sizes of the quantised dtypes are that package's, `gguf.GGML_QUANT_SIZES`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from planner.errors import ConfigError, shown
from planner.findings import Finding, listed, missing_shards
from planner.headers.safetensors_files import joined
from planner.headers.stored import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    StoredTensor,
    check_name,
    check_sizes,
    file_bytes,
    names_in,
)

MAX_KEYS = 2**16
MAX_KEPT_BYTES = 4096
MAX_KEPT_NUMBERS = 4096
MAX_DIMS = 4
STRING, ARRAY = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""Metadata types and the letters that `struct` has for them."""

SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")

Value = int | float | bool | str | tuple[int | float | bool, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufHeader:
    """Metadata and tensors of a GGUF file. Of long lists `lengths` keeps how long they are."""

    metadata: Mapping[str, Value]
    lengths: Mapping[str, int]
    tensors: tuple[StoredTensor, ...]


class _Reader:
    """Reads a header value by value and never beyond what a header may hold."""

    def __init__(self, file: BinaryIO, *, size: int, origin: str) -> None:
        self.file, self.origin = file, origin
        self.limit = min(size, MAX_HEADER_BYTES)
        self.order = "<"

    def refuse(self, what: str) -> ConfigError:
        return ConfigError(f"{self.origin}: {what} at byte {self.file.tell():,}")

    def take(self, length: int) -> bytes:
        if length > self.limit - self.file.tell():
            raise self.refuse(f"the header ends before {length:,} bytes more")
        return self.file.read(length)

    def skip(self, length: int) -> None:
        if length > self.limit - self.file.tell():
            raise self.refuse(f"the header ends before {length:,} bytes more")
        self.file.seek(length, 1)

    def number(self, letter: str) -> Any:
        packed = self.order + letter
        return struct.unpack(packed, self.take(struct.calcsize(packed)))[0]

    def text(self) -> str | None:
        """A string; None where it is longer than any that is needed here."""
        length = self.number("Q")
        if length > MAX_KEPT_BYTES:
            self.skip(length)
            return None
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise self.refuse("a string that is not UTF-8") from None

    def name(self) -> str:
        return check_name(self.text(), origin=self.origin)

    def value(self) -> tuple[Value | None, int | None]:
        """(value or None where it is not kept, length of a list or None)."""
        kind = self.number("I")
        if kind == STRING:
            return self.text(), None
        if kind in SCALARS:
            return self.number(SCALARS[kind]), None
        if kind != ARRAY:
            raise self.refuse(f"metadata type {kind} is not known")
        inner, count = self.number("I"), self.number("Q")
        if inner == STRING:
            if count > (self.limit - self.file.tell()) // 8:
                raise self.refuse(f"a list of {count:,} strings is longer than the header")
            for _ in range(count):
                self.skip(self.number("Q"))
            return None, count
        if inner not in SCALARS:
            raise self.refuse(f"a list of type {inner} is not read")
        width = struct.calcsize("<" + SCALARS[inner])
        if count > MAX_KEPT_NUMBERS:
            self.skip(count * width)
            return None, count
        packed = f"{self.order}{count}{SCALARS[inner]}"
        return struct.unpack(packed, self.take(count * width)), count


def read_header(path: Path) -> GgufHeader:
    """The header of one file; ConfigError in one line where it is not what it says."""
    sizes = quantised_sizes()
    size = file_bytes(path)
    try:
        with path.open("rb") as file:
            reader = _Reader(file, size=size, origin=str(path))
            if file.read(4) != b"GGUF":
                raise ConfigError(f"{path} is no GGUF file: it does not begin with GGUF")
            return _read(reader, size, path.name, sizes)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None


def _read(
    reader: _Reader, size: int, file: str, sizes: Mapping[int, tuple[str, int, int]]
) -> GgufHeader:
    version = reader.number("I")
    if version and not version & 0xFFFF:  # written for the other byte order
        reader.order, version = ">", version >> 24 | (version >> 8 & 0xFF00)
    if version not in (2, 3):
        raise reader.refuse(f"GGUF version {version} is not read (2, 3)")
    tensor_count, key_count = reader.number("Q"), reader.number("Q")
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise reader.refuse(
            f"{tensor_count:,} tensors and {key_count:,} keys, at most {MAX_TENSORS:,} and "
            f"{MAX_KEYS:,}"
        )
    metadata: dict[str, Value] = {}
    lengths: dict[str, int] = {}
    for _ in range(key_count):
        key = reader.name()
        if key in metadata or key in lengths:
            raise reader.refuse(f"{shown(key)} is there twice")
        value, length = reader.value()
        if value is not None:
            metadata[key] = value
        if length is not None:
            lengths[key] = length
    found = [_tensor(reader, file, sizes) for _ in range(tensor_count)]
    _check_offsets(reader, found, metadata.get("general.alignment", 32), size)
    names = {tensor.name for _, tensor in found}
    if len(names) != len(found):
        raise reader.refuse("a tensor is there twice")
    return GgufHeader(metadata=metadata, lengths=lengths, tensors=tuple(t for _, t in found))


def _tensor(
    reader: _Reader, file: str, sizes: Mapping[int, tuple[str, int, int]]
) -> tuple[int, StoredTensor]:
    name, dims = reader.name(), reader.number("I")
    if dims > MAX_DIMS:
        raise reader.refuse(f"{shown(name)} has {dims:,} dimensions, at most {MAX_DIMS}")
    order = [reader.number("Q") for _ in range(dims)]
    shape = check_sizes("shape", order[::-1], name=name, origin=reader.origin)
    kind, offset = reader.number("I"), reader.number("Q")
    if kind not in sizes:
        raise reader.refuse(f"{shown(name)} has ggml type {kind}, which gguf does not know")
    dtype, block, block_bytes = sizes[kind]
    if (shape[-1] if shape else 1) % block:
        raise reader.refuse(f"{shown(name)}: rows of {shape[-1]:,} are no blocks of {block}")
    size_bytes = prod(shape) // block * block_bytes
    return offset, StoredTensor(
        name=name, dtype=dtype, shape=shape, size_bytes=size_bytes, file=file
    )


def _check_offsets(
    reader: _Reader, found: list[tuple[int, StoredTensor]], alignment: Value, size: int
) -> None:
    """ggml's own rule: tensors lie in order, each at the next multiple of the alignment."""
    if type(alignment) is not int or not 0 < alignment < 2**31 or alignment & (alignment - 1):
        raise reader.refuse(f"general.alignment={shown(alignment)} is not a power of two")

    def padded(length: int) -> int:
        return -(-length // alignment) * alignment

    start, position = padded(reader.file.tell()), 0
    for offset, tensor in found:
        if offset != padded(position):
            raise reader.refuse(
                f"{shown(tensor.name)} lies at {offset:,} of the data, not at {padded(position):,},"
            )
        position = offset + tensor.size_bytes
    if found and start + position > size:
        raise ConfigError(
            f"{reader.origin} is truncated: its header describes {start + position:,} bytes, "
            f"{size:,} are there"
        )


def quantised_sizes() -> dict[int, tuple[str, int, int]]:
    """ggml type → (name, elements of a block, bytes of a block), as the gguf package has them."""
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise ConfigError(
            "GGUF files need the package gguf: pip install 'transformer-planner[files]'"
        ) from None
    return {
        int(kind): (kind.name, block, block_bytes)
        for kind, (block, block_bytes) in GGML_QUANT_SIZES.items()
    }


def read_gguf(path: Path) -> tuple[GgufHeader, tuple[Finding, ...]]:
    """The header of a file, with the tensors of the files that it is split into."""
    header = read_header(path)
    count = header.metadata.get("split.count", 1)
    split = SPLIT.fullmatch(path.name)
    if type(count) is not int or count <= 1 or split is None:
        return header, ()
    if count != int(split[3]):
        raise ConfigError(f"{path} says split.count={count}, its name says {int(split[3])}")
    names = [f"{split[1]}-{i:05}-of-{split[3]}.gguf" for i in range(1, count + 1)]
    there = [name for name in names if (path.parent / name).is_file()]
    headers = [read_header(path.parent / name) for name in there]
    whole = GgufHeader(
        metadata=headers[0].metadata,
        lengths=headers[0].lengths,
        tensors=joined(h.tensors for h in headers),
    )
    absent = [name for name in names if name not in there]
    where = str(path.parent)
    lost = [missing_shards(absent, of=count, tensors=None, where=where)] if absent else []
    return whole, tuple(lost)


def find_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder, the first one of a split; ConfigError where there are several."""
    found = [path for path in names_in(folder) if path.suffix == ".gguf"]
    firsts = [path for path in found if not (m := SPLIT.fullmatch(path.name)) or int(m[2]) == 1]
    if len(firsts) > 1:
        names = listed([path.name for path in firsts])
        raise ConfigError(f"{folder} holds {len(firsts)} GGUF files ({names}): name one of them")
    return next(iter(firsts or found), None)
