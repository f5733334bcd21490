"""Quantised weight files beside the `quantization_config`: each tensor that stands for a parameter.

`Model.stored_tensors` says how a method lays a layer down: packed words, scales, zero points. Files
of a mixture name each expert; equal ones are compared as many copies of one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from planner.checkpoints.comparison import PREFIXES, Expected, differences
from planner.errors import ConfigError
from planner.findings import Finding
from planner.headers.stored import StoredTensor
from planner.model import Model

COMPARED = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "mxfp4")
"""Methods whose files hold the tensors of memory under the same names."""

WORDS = {
    "fp32": "F32",
    "bf16": "BF16",
    "fp16": "F16",
    "fp8": "F8",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "bool": "BOOL",
}
"""The files' words for dtypes; F8 is any of the 8-bit floats."""

EXPERT = re.compile(r"\.experts\.\d+\.")
FREE_LENGTH = re.compile(r"quant_state\.")
"""bitsandbytes writes settings as JSON in a tensor; some numbers take more digits than others."""


def compare_quantised(model: Model, tensors: Sequence[StoredTensor]) -> Iterator[Finding]:
    """What the files lack, have more, or hold in another shape or dtype than the settings say."""
    method = None if model.quantization is None else model.quantization.method
    if model.quantization is None:
        yield Finding(
            id="quantised",
            severity="warning",
            title="The files are quantised, and the config does not say how",
            seen="quantization_config is missing",
            why="The bytes are exact; what loads this config would take none of these tensors.",
            do="Take the config.json that was written with the files.",
        )
        return
    if method not in COMPARED:
        yield Finding(
            id="quantised",
            severity="note",
            title=f"Files of {method} are not compared with the config yet",
            seen=f"quantization_config.quant_method={method!r}",
            why="The bytes are exact; that every tensor is there is not checked.",
        )
        return
    try:
        expected = expected_quantised(model)
    except ConfigError as error:
        yield Finding(
            id="not-compared",
            severity="warning",
            title="The files are compared with no layout",
            seen=str(error),
            why="The bytes are exact; that every tensor is there is not checked.",
        )
        return
    yield from differences(model, [(shared(t.name), t) for t in tensors], expected)


def shared(name: str) -> str:
    """A tensor's name without its base module, experts under one name."""
    return EXPERT.sub(".experts.*.", PREFIXES.sub("", name))


def expected_quantised(model: Model) -> dict[str, Expected]:
    """What a checkpoint of this config holds, by the name that both sides share."""
    made: dict[str, Expected] = {}
    for _, stored in model.stored_tensors():
        made[shared(stored.name)] = Expected(
            name=stored.name,
            shape=stored.shape,
            dtype=WORDS[stored.dtype],
            copies=stored.copies,
            any_length=bool(FREE_LENGTH.search(stored.name)),
        )
    return made
