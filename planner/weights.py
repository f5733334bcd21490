"""Ledger rows of the weights: parameters by group, or what stands for them where quantised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache

from planner.dtypes import element_bytes
from planner.ledger import Row, parameter_rows
from planner.model import Model
from planner.quantization.base import STORED_BYTES
from planner.quantization.gguf import Gguf
from planner.runtimes.base import Runtime


def weight_rows(
    model: Model, runtime: Runtime, dtype: str, *, note: str, capability: str | None = None
) -> list[Row]:
    """One row for each group of parameters, then the runtime's buffers."""
    rows: Iterable[Row]
    match model.quantization:
        case None:
            rows = _plain_rows(model, dtype, note=note)
        case Gguf(held=held) if held and runtime.name == "llama.cpp":
            rows = _gguf_rows(held)
        case _:
            rows = _stored_rows(model, dtype)
            if note:
                rows = [replace(row, note=f"{row.note}; {note}") for row in rows]
    return [*rows, *runtime.buffer_rows(model, dtype=dtype, capability=capability)]


def _gguf_rows(held: tuple[tuple[str, int, int], ...]) -> Iterator[Row]:
    """One row for each ggml type of a GGUF file, with the bytes of its header."""
    for kind, tensors, size_bytes in held:
        yield Row(
            component="weights",
            item=f"{kind}, {tensors} tensor{'s' * (tensors > 1)} of the file",
            count=1,
            formula="bytes",
            values=(("bytes", size_bytes),),
            size_bytes=size_bytes,
            note="quantised: gguf",
        )


def _plain_rows(model: Model, dtype: str, *, note: str) -> list[Row]:
    groups = {str(group): sizes for group, sizes in model.parameter_groups().items()}
    return parameter_rows(groups, element_bytes(dtype), note=note)


@lru_cache(maxsize=128)
def _stored_rows(model: Model, dtype: str) -> tuple[Row, ...]:
    """Quantised weights: a row for each group, role and dtype of what is stored."""
    assert model.quantization is not None
    sizes: dict[tuple[str, str, str], tuple[int, int]] = {}
    for p, stored in model.stored_tensors(dtype):
        key = (p.group, stored.role, stored.dtype)
        tensors, size = sizes.get(key, (0, 0))
        sizes[key] = (tensors + stored.copies, size + stored.size_bytes)
    return tuple(stored_rows(sizes, model.quantization.method))


def stored_rows(
    sizes: Mapping[tuple[str, str, str], tuple[int, int]], method: str
) -> Iterator[Row]:
    """A row for each (group, role, dtype) of quantised weights, from its (tensors, bytes)."""
    for (group, role, dtype), (tensors, size) in sizes.items():
        yield Row(
            component="weights",
            item=f"{group.replace('_', ' ')}, {role}s in {dtype}, "
            f"{tensors} tensor{'s' * (tensors > 1)}",
            count=1,
            formula="elements · b",
            values=(("elements", size // STORED_BYTES[dtype]), ("b", STORED_BYTES[dtype])),
            size_bytes=size,
            note=f"quantised: {method}",
        )
