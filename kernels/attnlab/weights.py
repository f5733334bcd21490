"""Weights of a Hugging Face checkpoint into our modules: the family's names and orientation.

Fused matrices keep the family's layout, which attention reads as it lies: nothing is reordered.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnlab.encoder import EncoderModel
from attnlab.transformer import Transformer
from planner.checkpoints.checkpoint import read_checkpoint
from planner.checkpoints.comparison import spelled
from planner.errors import ConfigError

BUFFERS = (
    "inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
    "embed_scale",
    "position_ids",
)
"""Endings of tensors that checkpoints may hold and no parameter is made from."""

EXPERT = re.compile(r"\.experts\.(\d+)\.(\w+)\.weight$")
"""A tensor of one expert in files that keep them apart: its number and which projection."""

COPIES = (
    "lm_head.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "cls.predictions.decoder.bias",
    "lm_head.decoder.weight",
    "lm_head.decoder.bias",
    "roberta.embeddings.word_embeddings.weight",
)
"""What checkpoints may repeat a tied embedding, or the bias of its head, as."""

OPTIONAL = "final_logits_bias"
"""A buffer of zeros where a checkpoint lacks it (bart)."""

DTYPES = ("F64", "F32", "F16", "BF16")
"""What safetensors call the dtypes that are converted to the transformer's."""


def load_state_dict(transformer: Transformer | EncoderModel, state: Mapping[str, Tensor]) -> None:
    """Copy every parameter from `state`, converted to the transformer's dtype.

    Buffers and the copy of a tied head are passed over. Raises ConfigError, before anything is
    copied, when another tensor is missing, too many or of another shape.
    """
    _check(transformer, {name: tuple(tensor.shape) for name, tensor in state.items()})
    _copy(transformer, state)


def load_safetensors(transformer: Transformer | EncoderModel, path: str | Path) -> None:
    """Copy every parameter from a .safetensors file, or a folder of one or of shards with an index.

    One tensor is read at a time. Raises ConfigError as `load_state_dict` does, for files that are
    not whole and for dtypes that are not numbers to convert.
    """
    files = read_checkpoint(path)
    if files.kind != "safetensors":
        raise ConfigError(f"{path} holds {files.kind}: safetensors are loaded")
    broken = next((found for found in files.findings if found.severity == "error"), None)
    if broken is not None:
        raise ConfigError(f"{path}: {broken.title}: {broken.seen}")
    odd = [f"{t.name} in {t.dtype}" for t in files.tensors if t.dtype not in DTYPES]
    if odd:
        raise ConfigError(f"{path} holds {_listed(odd)}: {', '.join(DTYPES)} are loaded")
    _check(transformer, {tensor.name: tensor.shape for tensor in files.tensors})
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    with ExitStack() as stack:
        _copy(transformer, _Files({t.name: folder / t.file for t in files.tensors}, stack))


class _Files(Mapping[str, Tensor]):
    """Tensors by the files they lie in, each read when it is asked for."""

    def __init__(self, where: dict[str, Path], stack: ExitStack) -> None:
        self._where, self._stack = where, stack
        self._opened: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        path = self._where[name]
        if path not in self._opened:
            self._opened[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        tensor: Tensor = self._opened[path].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def _sources(transformer: Transformer | EncoderModel, there: Iterable[str]) -> dict[str, list[str]]:
    """Parameter or buffer → the tensors that it is made of, whatever the files call them.

    Checkpoints of the model without its head (gpt2, bloom) leave the base module's name out; hubs
    keep experts apart, `experts.0.w1.weight`, of which one tensor is made here.
    """
    found: dict[str, list[str]] = {}
    for name in there:
        found.setdefault(spelled(name), []).append(name)
    named = {
        name: spelled(transformer.model.checkpoint_name(name)) for name in _tensors(transformer)
    }
    return {name: found.get(theirs, []) for name, theirs in named.items()}


def _tensors(transformer: Transformer | EncoderModel) -> dict[str, Tensor]:
    """What is loaded: the parameters, and the buffers that a module keeps with them."""
    kept = transformer.state_dict(keep_vars=True)
    named = {p.name: kept[p.name] for p in transformer.model.parameters()}
    return named | kept


def _check(transformer: Transformer | EncoderModel, there: Mapping[str, tuple[int, ...]]) -> None:
    model, sources = transformer.model, _sources(transformer, there)
    copies = {spelled(name) for name in (*COPIES, model.checkpoint_name("lm_head.weight"))}
    tied = [name for name in there if model.tie_word_embeddings and spelled(name) in copies]
    known = {*tied, *(name for names in sources.values() for name in names)}
    lacking = [name for name, found in sources.items() if not found and name != OPTIONAL]
    _refuse("lacks", [model.checkpoint_name(name) for name in lacking])
    extra = [name for name in there if name not in known and not _is_buffer(name)]
    _refuse("has besides the model's tensors", extra)
    shapes = {
        p.name: there_.shape
        for p, there_ in zip(model.parameters(), model.checkpoint_parameters(), strict=True)
    }
    odd = []
    for name, tensor in _tensors(transformer).items():
        shape = shapes.get(name, tuple(tensor.shape))
        if len(sources[name]) > 1 or EXPERT.search("".join(sources[name])):
            whole = {(e, half) for e in range(shape[0]) for half in range(_halves(name))}
            if {_place(source) for source in sources[name]} != whole:
                _refuse("lacks experts of", [model.checkpoint_name(name)])
            shape = (shape[1] // _halves(name), shape[2])
        odd += [
            f"{source} {list(there[source])} instead of {list(shape)}"
            for source in sources[name]
            if there[source] != shape
        ]
    _refuse("has in another shape", odd)


@torch.no_grad()
def _copy(transformer: Transformer | EncoderModel, state: Mapping[str, Tensor]) -> None:
    turned = {p.name for p in transformer.model.parameters() if p.layer is not None}
    turned = turned if transformer.model.transposed_linears else set()
    sources = _sources(transformer, state)
    for name, tensor in _tensors(transformer).items():
        for source in sources[name]:
            given, part = state[source], tensor
            if EXPERT.search(source):
                expert, half = _place(source)
                part = tensor[expert].chunk(_halves(name))[half]
            part.copy_(given.T if name in turned and given.dim() == 2 else given)


def _place(name: str) -> tuple[int, int]:
    """(expert, 0 or for the second half of gate and up 1) of a tensor of one expert."""
    found = EXPERT.search(name)
    return (int(found[1]), int(found[2] in ("up_proj", "w3"))) if found else (-1, 0)


def _halves(name: str) -> int:
    return 2 if name.endswith("gate_up_proj") else 1


def _is_buffer(name: str) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in BUFFERS)


def _refuse(what: str, names: list[str]) -> None:
    if names:
        raise ConfigError(f"the state dict {what}: {_listed(names)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
