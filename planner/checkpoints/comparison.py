"""What lies in the files beside what the config says: tensor by tensor, by what fuses into what.

Hub checkpoints name tensors in their own way. Both sides are brought to one spelling here, so that
the base module's prefix and mixtral's `block_sparse_moe` make no difference, and the tensors of
single experts are gathered under the fused tensor that transformers 5 makes of them
(transformers 5.23, conversion_mapping.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from planner.checkpoints.extra_tensors import extras
from planner.dtypes import ELEMENT_BYTES
from planner.findings import Finding, listed
from planner.format import gib
from planner.headers.stored import StoredTensor
from planner.model import Model

PREFIXES = re.compile(r"^(?:(?:model|transformer|gpt_neox|language_model)\.)+")
SPELLINGS = tuple(
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"\.mlp\.input_linear\.weight$", ".mlp.experts.gate_up_proj"),  # granitemoe
        (r"\.mlp\.output_linear\.weight$", ".mlp.experts.down_proj"),
        (r"\.mlp\.router\.layer\.", ".mlp.router."),
        (r"\.mlp\.gate\.weight$", ".mlp.router.weight"),  # phimoe
        (r"\.experts\.\d+\.(?:gate_proj|up_proj|w1|w3)\.weight$", ".experts.gate_up_proj"),
        (r"\.experts\.\d+\.(?:down_proj|w2)\.weight$", ".experts.down_proj"),
        (r"\.mlp\.moe_statics\.", ".mlp.gate.moe_statics."),  # ernie4_5_moe
        (r"^embed_out\.", "lm_head."),  # gpt_neox
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
        (r"\bencoder\.layer\.", "layers."),  # vit, and the four below
        (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    )
)
"""Their spelling → the one that both sides are brought to."""

QUANTISED = re.compile(
    r"(?:weight_scale(?:_inv|_2)?|weight_packed|qweight|qzeros|\.scales|_blocks|_scales|\.SCB"
    r"|absmax|quant_map|quant_state\.\S+|input_scale)$"
)
UNMATCHED = frozenset(
    (
        "bart",
        "deberta",
        "deepseek_v4",
        "dinov2",
        "gemma4",
        "gemma4_text",
        "gemma4_unified",
        "gemma4_unified_text",
        "kimi_k25",
        "kimi_linear",
        "lfm2_moe",
        "lfm3",
        "mbart",
        "minimax",
        "nemotron_h",
        "olmo_hybrid",
        "pegasus",
    )
)
"""Types whose files name or cut their tensors in ways that `SPELLINGS` does not know yet."""

WORDS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
WORD_BYTES = {
    **{word: ELEMENT_BYTES[dtype] for dtype, word in WORDS.items()},
    **{"F8": 1, "I8": 1, "U8": 1, "BOOL": 1, "I16": 2, "I32": 4, "I64": 8},
}
"""Bytes of an element by the files' word."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """A tensor that the config asks for, under the spelling that both sides share.

    `experts`: the first dimension counts experts, which may lie apart; `in_parts`: so may this one,
    in any way; `copies`: so many lie apart, each of this shape. `any_length`: of one dimension,
    however long. `dtype` is the files' word for the config's ("F8": any 8-bit float); None where
    the config does not say.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None
    experts: bool = False
    in_parts: bool = False
    copies: int = 1
    any_length: bool = False

    def has_dtype(self, part: StoredTensor) -> bool:
        """Whether a stored tensor is in the dtype that is asked for."""
        if self.dtype == "F8":
            return part.dtype.startswith("F8")
        return self.dtype in (None, part.dtype)


@dataclass(slots=True)
class _Differences:
    missing: list[Expected] = field(default_factory=list)
    shapes: list[tuple[Expected, list[StoredTensor]]] = field(default_factory=list)
    dtypes: list[tuple[Expected, StoredTensor]] = field(default_factory=list)
    extra: list[tuple[str, StoredTensor]] = field(default_factory=list)


def spelled(name: str) -> str:
    """A tensor's name without its base module, in the spelling that both sides share."""
    name = PREFIXES.sub("", name)
    for theirs, ours in SPELLINGS:
        name = theirs.sub(ours, name)
    return name


def expected_tensors(model: Model) -> dict[str, Expected]:
    """What a checkpoint of this config holds, by the shared spelling."""
    made = {}
    for p in model.checkpoint_parameters():
        name = spelled(p.name)
        made[name] = Expected(
            name=p.name,
            shape=p.shape,
            dtype=WORDS[model.dtype],
            experts=p.group == "experts" and len(p.shape) == 3,
        )
    return made


def compare(model: Model, tensors: Sequence[StoredTensor]) -> Iterator[Finding]:
    """What the files lack, have more, or hold in another shape or dtype than the config says."""
    if model.model_type in UNMATCHED:
        yield Finding(
            id="not-compared",
            severity="note",
            title=f"The tensor names of {model.model_type} files are not compared yet",
            seen=f"model_type={model.model_type}",
            why="The bytes are exact; that every tensor is there is not checked.",
        )
        return
    expected = expected_tensors(model)
    yield from differences(model, [(spelled(t.name), t) for t in tensors], expected)


def differences(
    model: Model, named: Iterable[tuple[str, StoredTensor]], expected: Mapping[str, Expected]
) -> Iterator[Finding]:
    """The findings on tensors under the names that they share with what is expected."""
    found = _sorted_out(named, expected)
    yield from _missing(found.missing)
    yield from _other_shapes(found.shapes)
    yield from _other_dtypes(model, found.dtypes)
    yield from extras(model, found.extra)


def _sorted_out(
    named: Iterable[tuple[str, StoredTensor]], expected: Mapping[str, Expected]
) -> _Differences:
    pieces: dict[str, list[StoredTensor]] = {}
    for name, tensor in named:
        pieces.setdefault(name, []).append(tensor)
    found = _Differences()
    for name, wanted in expected.items():
        parts = pieces.pop(name, [])
        if not parts:
            found.missing.append(wanted)
        elif not _fits(wanted, parts):
            found.shapes.append((wanted, parts))
        found.dtypes += [(wanted, part) for part in parts if not wanted.has_dtype(part)]
    found.extra = [(name, tensor) for name, parts in pieces.items() for tensor in parts]
    return found


def _fits(wanted: Expected, parts: list[StoredTensor]) -> bool:
    if wanted.in_parts:
        return sum(part.count for part in parts) == prod(wanted.shape)
    if wanted.any_length:
        return all(len(part.shape) == 1 for part in parts)
    if wanted.copies > 1:
        return len(parts) == wanted.copies and all(part.shape == wanted.shape for part in parts)
    if len(parts) == 1:
        return parts[0].shape == wanted.shape
    if not wanted.experts or len(parts) % wanted.shape[0]:
        return False
    E, out, into = wanted.shape
    each = (out * E // len(parts), into)  # gate and up apart: half the rows in each
    return len(parts) // E <= 2 and all(part.shape == each for part in parts)


def _missing(missing: list[Expected]) -> Iterator[Finding]:
    if missing:
        elements = sum(prod(wanted.shape) for wanted in missing)
        yield Finding(
            id="missing-tensors",
            severity="error",
            title=f"{len(missing):,} tensors of the config are in no file",
            seen=listed([wanted.name for wanted in missing]),
            why=f"{elements:,} parameters would be made up at random on loading.",
            do="Look for a missing shard, or a config.json of another model.",
        )


def _other_shapes(shapes: list[tuple[Expected, list[StoredTensor]]]) -> Iterator[Finding]:
    def said(wanted: Expected, parts: list[StoredTensor]) -> str:
        kinds = sorted({part.shape for part in parts})
        there = listed([f"{list(shape)}" for shape in kinds], most=2)
        times = f"{len(parts):,} × " if len(parts) > 1 else ""
        return f"{wanted.name} is {times}{there}, not {list(wanted.shape)}"

    if shapes:
        yield Finding(
            id="other-shapes",
            severity="error",
            title=f"{len(shapes):,} tensors have another shape than the config says",
            seen=listed([said(wanted, parts) for wanted, parts in shapes], most=2),
            why="Sizes that are predicted from this config are not those of these files.",
            do="Take the config.json that was written with the files.",
        )


def _other_dtypes(model: Model, pairs: list[tuple[Expected, StoredTensor]]) -> Iterator[Finding]:
    if not pairs:
        return
    others = [tensor for _, tensor in pairs]
    size_bytes = sum(tensor.size_bytes for tensor in others)
    planned = sum(tensor.count * WORD_BYTES[str(wanted.dtype)] for wanted, tensor in pairs)
    words = ", ".join(sorted({tensor.dtype for tensor in others}))
    source = "is assumed" if "dtype=float32" in model.defaults else "is the config's dtype"
    asked = {wanted.dtype for wanted, _ in pairs}
    if asked == {WORDS[model.dtype]}:
        title = f"{len(others):,} tensors are {words}, {model.dtype} {source}"
    else:
        wanted_words = ", ".join(sorted(map(str, asked)))
        title = f"{len(others):,} tensors are {words}, the config asks for {wanted_words}"
    yield Finding(
        id="other-dtype",
        severity="warning",
        title=title,
        seen=listed([tensor.name for tensor in others]),
        why=f"They take {gib(size_bytes)} in the files, {gib(planned)} when loaded as planned.",
        do="Give the dtype you load in: dtype=…",
    )
