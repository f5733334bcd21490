"""What a header says of a tensor in a file; every size in it is checked before it is believed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from planner.errors import ConfigError, shown

MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself allows; no header of a real model comes near."""

MAX_TENSORS = 2**19
MAX_NAME = 1024
MAX_DIMENSIONS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor of a file: dtype in the file's own word, shape as torch has it, exact bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    file: str

    @property
    def count(self) -> int:
        """Elements of the tensor."""
        return prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class DtypeShare:
    """What lies in the files in one dtype."""

    dtype: str
    tensors: int
    elements: int
    size_bytes: int


def dtype_mix(tensors: Iterable[StoredTensor]) -> tuple[DtypeShare, ...]:
    """The share of every dtype, the one with most bytes first."""
    sums: dict[str, tuple[int, int, int]] = {}
    for t in tensors:
        n, elements, size_bytes = sums.get(t.dtype, (0, 0, 0))
        sums[t.dtype] = (n + 1, elements + t.count, size_bytes + t.size_bytes)
    mix = [
        DtypeShare(dtype=dtype, tensors=n, elements=elements, size_bytes=size_bytes)
        for dtype, (n, elements, size_bytes) in sums.items()
    ]
    return tuple(sorted(mix, key=lambda share: (-share.size_bytes, share.dtype)))


def check_name(name: object, *, origin: str) -> str:
    """A name that can be printed in one line; ConfigError otherwise."""
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise ConfigError(
            f"{origin} has a tensor named {shown(name)}: 1 to {MAX_NAME} printable characters"
        )
    return name


def check_sizes(field: str, sizes: object, *, name: str, origin: str) -> tuple[int, ...]:
    """Up to 16 whole numbers below 2⁶³; ConfigError otherwise."""
    if (
        not isinstance(sizes, list | tuple)
        or len(sizes) > MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size < 2**63 for size in sizes)
    ):
        raise ConfigError(
            f"{origin}: {field}={shown(sizes)} of {shown(name)} is not allowed: up to "
            f"{MAX_DIMENSIONS} whole numbers"
        )
    return tuple(sizes)


def file_bytes(path: Path) -> int:
    """The size of a regular file; ConfigError for anything else (a pipe would wait for ever)."""
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    if size is None:
        raise ConfigError(f"{path} is not a file")
    return size


def names_in(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}") from None
