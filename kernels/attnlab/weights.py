"""Weights of a Hugging Face checkpoint into a Transformer: the family's names and orientation.

Fused matrices keep the family's layout, which attention reads as it lies: nothing is reordered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnlab.transformer import Transformer
from planner.checkpoint import read_checkpoint
from planner.errors import ConfigError
from planner.model import Model

BUFFERS = (
    "inv_freq",
    "attn.bias",
    "attn.masked_bias",
    "attention.bias",
    "attention.masked_bias",
    "embed_scale",
)
"""Endings of tensors that checkpoints may hold and no parameter is made from."""

BIAS = "final_logits_bias"
"""A buffer that is read where a checkpoint has it."""

DTYPES = ("F64", "F32", "F16", "BF16")
"""What safetensors call the dtypes that are converted to the transformer's."""


def load_state_dict(transformer: Transformer, state: Mapping[str, Tensor]) -> None:
    """Copy every parameter from `state`, converted to the transformer's dtype.

    Buffers and the copy of a tied head are passed over. Raises ConfigError, before anything is
    copied, when another tensor is missing, too many or of another shape.
    """
    _check(transformer, {name: tuple(tensor.shape) for name, tensor in state.items()})
    _copy(transformer, state)


def load_safetensors(transformer: Transformer, path: str | Path) -> None:
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


def _names(transformer: Transformer, there: Mapping[str, Any]) -> dict[str, str]:
    """Parameter → its name in the checkpoint, which may be one of the model without its head.

    Such checkpoints (gpt2, bloom) leave the base module's name out: `h.0` for `transformer.h.0`.
    """
    model = transformer.model
    both = zip(model.parameters(), model.checkpoint_parameters(), strict=True)
    names = {ours.name: theirs.name for ours, theirs in both}
    embedding = names["embed_tokens.weight"]
    base = embedding.partition(".")[0] + "."
    if embedding not in there and embedding.removeprefix(base) in there:
        return {ours: name.removeprefix(base) for ours, name in names.items()}
    return names


def _check(transformer: Transformer, there: Mapping[str, tuple[int, ...]]) -> None:
    model, names = transformer.model, _names(transformer, there)
    known = {*names.values(), *(_copies(model) if model.tie_word_embeddings else [])}
    _refuse("lacks", [name for name in names.values() if name not in there])
    extra = [name for name in there if name not in known and not _is_buffer(name)]
    _refuse("has besides the model's tensors", extra)
    shapes = zip(names.values(), (p.shape for p in model.checkpoint_parameters()), strict=True)
    _refuse(
        "has in another shape",
        [
            f"{name} {list(there[name])} instead of {list(shape)}"
            for name, shape in shapes
            if there[name] != shape
        ],
    )


@torch.no_grad()
def _copy(transformer: Transformer, state: Mapping[str, Tensor]) -> None:
    model, names = transformer.model, _names(transformer, state)
    parameters = dict(transformer.named_parameters())
    for p in model.parameters():
        tensor = state[names[p.name]]
        swap = model.transposed_linears and p.layer is not None and tensor.dim() == 2
        parameters[p.name].copy_(tensor.T if swap else tensor)
    if model.final_logits_bias and BIAS in state:
        transformer.final_logits_bias.copy_(state[BIAS])


def _copies(model: Model) -> list[str]:
    """Names of a tied embedding that checkpoints may repeat: the head's, those of both stacks."""
    names = ["lm_head.weight", model.checkpoint_name("lm_head.weight")]
    if model.is_seq2seq:
        stacks = ("encoder", "decoder")
        names += [f"{r}{s}.embed_tokens.weight" for r in ("", "model.") for s in stacks]
    return names + [BIAS] * model.final_logits_bias


def _is_buffer(name: str) -> bool:
    return any(f".{name}".endswith(f".{ending}") for ending in BUFFERS)


def _refuse(what: str, names: list[str]) -> None:
    if names:
        raise ConfigError(f"the state dict {what}: {_listed(names)}")


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
